//! A name and an index to a [`Device`]: the only file that names a backend.
//!
//! Backends are Cargo features; several can be compiled in, and `--backend NAME[:INDEX]` chooses when the program
//! runs. Where a GPU backend numbers its devices, the order is the one it lists them in.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Mutex;

#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
use burn::tensor::DeviceKind;
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal", feature = "cuda", feature = "cpu"))]
use burn::tensor::DeviceType;
use burn::tensor::{Device, FloatDType};

use crate::config::nearest;
use crate::group::local_rank;
use crate::kernels::{Precision, TrunkPrecision};

/// In the place of an index: as the launcher numbers the processes of a machine.
const LOCAL_RANK: &str = "local-rank";

/// The backend of a run that names none.
pub const DEFAULT: &str = "flex";

/// A backend this program knows, compiled in or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackendInfo {
    /// Its name for `--backend`, and the Cargo feature that compiles it in.
    pub name: &'static str,
    /// The hardware it runs on.
    pub description: &'static str,
    /// Whether this program holds it.
    pub compiled_in: bool,
}

const BACKENDS: [BackendInfo; 7] = [
    BackendInfo {
        name: "flex",
        description: "CPU, pure Rust, with our fused kernels; the default",
        compiled_in: cfg!(feature = "flex"),
    },
    BackendInfo {
        name: "ndarray",
        description: "CPU, through the `ndarray` crate",
        compiled_in: cfg!(feature = "ndarray"),
    },
    BackendInfo {
        name: "wgpu",
        description: "GPU, whichever graphics API the machine offers",
        compiled_in: cfg!(feature = "wgpu"),
    },
    BackendInfo { name: "vulkan", description: "GPU, through Vulkan", compiled_in: cfg!(feature = "vulkan") },
    BackendInfo { name: "metal", description: "GPU, through Apple's Metal", compiled_in: cfg!(feature = "metal") },
    BackendInfo { name: "cuda", description: "NVIDIA GPU, through CUDA", compiled_in: cfg!(feature = "cuda") },
    BackendInfo {
        name: "cpu",
        description: "CPU, kernels compiled at run time by CubeCL",
        compiled_in: cfg!(feature = "cpu"),
    },
];

/// Every backend, in the order of the documentation.
pub fn list() -> &'static [BackendInfo] {
    &BACKENDS
}

/// A device that a backend of this program can open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundDevice {
    /// Its name for `--backend`.
    pub name: String,
    /// Its own name.
    pub adapter: String,
    /// Whether it is a graphics driver that computes on the CPU.
    pub is_software: bool,
    /// Its memory in bytes, where it can be known: Burn reports none for a graphics card.
    pub memory: Option<u64>,
    /// The precisions it supports.
    pub precisions: Vec<Precision>,
}

/// The devices of a backend that is compiled in. Opens each of them.
pub fn devices(info: &BackendInfo) -> Vec<FoundDevice> {
    let opened = enumerate(info.name);
    let several = opened.len() > 1;
    let found = |(index, device): (usize, Device)| {
        let on_host = is_host(info.name);
        let adapter = adapter(&device).unwrap_or_else(|| "the CPU".to_owned());
        let is_software = is_software(&adapter);
        FoundDevice {
            name: if several { format!("{}:{index}", info.name) } else { info.name.to_owned() },
            memory: if on_host || is_software { host_memory() } else { None },
            precisions: Precision::ALL.into_iter().filter(|&p| refusal(info.name, &device, p).is_none()).collect(),
            adapter,
            is_software,
        }
    };
    opened.into_iter().enumerate().map(found).collect()
}

/// The output of `--backend list`: a line for every device, and for every backend without one what is missing.
pub fn table() -> String {
    let mut rows = vec![["backend", "device", "memory", "precision"].map(str::to_owned)];
    for info in &BACKENDS {
        let found = if info.compiled_in { devices(info) } else { Vec::new() };
        if found.is_empty() {
            let lacks = if info.compiled_in {
                format!("none found: {}", driver_hint(info.name))
            } else {
                format!("not compiled in: build with `--features {}`", info.name)
            };
            rows.push([info.name.to_owned(), lacks, String::new(), String::new()]);
        }
        for device in found {
            let software = if device.is_software { ", a software adapter" } else { "" };
            let memory = device.memory.map_or("not reported".to_owned(), gibibytes);
            let memory = if device.is_software { format!("{memory} (the host's)") } else { memory };
            let precisions: Vec<&str> = device.precisions.iter().map(|precision| precision.name()).collect();
            rows.push([device.name, format!("{}{software}", device.adapter), memory, precisions.join(", ")]);
        }
    }
    let width = |column: usize| {
        // A remark without memory and precision beside it may be as long as it likes.
        let cells = rows.iter().filter(|row| column == 0 || !row[3].is_empty()).map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths = [0, 1, 2].map(width);
    let mut text = String::new();
    for [name, device, memory, precision] in &rows {
        let line = format!("{name:<0$}  {device:<1$}  {memory:<2$}  {precision}", widths[0], widths[1], widths[2]);
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// The backend and, where it has devices of several kinds, the one in use: for manifests and logs.
pub fn label(name: &str, device: &Device) -> String {
    match adapter(device) {
        Some(adapter) => format!("{name}: {adapter}"),
        None => name.to_owned(),
    }
}

/// Why a model cannot compute in `precision` on the device that `name` opened; `None` if it can.
fn refusal(name: &str, device: &Device, precision: Precision) -> Option<&'static str> {
    if precision == Precision::F32 {
        None
    } else if is_host(name) {
        Some("its arithmetic on the CPU is made for f32, and in 16 bits would be slower, not faster")
    } else if device.supports_dtype(precision.dtype()) {
        None
    } else {
        Some("the device does not report arithmetic in it")
    }
}

/// Checks that a model can compute in `precision` on the device that `name` opened.
///
/// # Errors
/// [`BackendError::Precision`] with the reason.
pub fn check_precision(name: &str, device: &Device, precision: Precision) -> Result<(), BackendError> {
    match refusal(name.split(':').next().unwrap_or(name), device, precision) {
        Some(reason) => Err(BackendError::Precision { name: label(name, device), precision: precision.name(), reason }),
        None => Ok(()),
    }
}

/// Checks that the device that `name` opened can hold weights in the type of `trunk`.
///
/// # Errors
/// [`BackendError::Trunk`].
pub fn check_trunk(name: &str, device: &Device, trunk: TrunkPrecision) -> Result<(), BackendError> {
    let holds_bf16 = || name.split(':').next() == Some(DEFAULT) || device.supports_dtype(FloatDType::BF16);
    if trunk == TrunkPrecision::F32 || holds_bf16() {
        return Ok(());
    }
    Err(BackendError::Trunk { name: label(name, device) })
}

/// Whether the backend computes on the host without a driver of any kind, and so in f32 only.
pub fn is_host(name: &str) -> bool {
    ["flex", "ndarray"].contains(&name)
}

/// Whether a graphics driver of this name computes on the CPU.
fn is_software(adapter: &str) -> bool {
    let adapter = adapter.to_lowercase();
    ["llvmpipe", "lavapipe", "swiftshader", "softpipe", "basic render driver"].iter().any(|name| adapter.contains(name))
}

/// The name of the adapter behind a device; `None` for a backend that has only one. Opens the device.
pub fn adapter(device: &Device) -> Option<String> {
    #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal", feature = "cuda", feature = "cpu"))]
    return device.identity().map(|identity| identity.name);
    #[cfg(not(any(feature = "wgpu", feature = "vulkan", feature = "metal", feature = "cuda", feature = "cpu")))]
    {
        let _ = device;
        None
    }
}

/// Requirements of a backend on the machine besides this program.
fn driver_hint(name: &str) -> &'static str {
    match name {
        "wgpu" => "install a Vulkan driver; Debian's `mesa-vulkan-drivers` holds one for the CPU too",
        "vulkan" => "install a Vulkan driver",
        "metal" => "it needs macOS on a Mac with a Metal device",
        "cuda" => "install NVIDIA's driver, of which `libcuda` is a part, and the CUDA toolkit's `nvrtc`",
        _ => "this machine has none",
    }
}

/// The machine's memory in bytes, where the system says so.
fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// Opens the device `NAME[:INDEX]`, without autodiff, `NAME:local-rank` that with the number of this process among those of
/// its machine; training calls [`Device::autodiff`] on it.
///
/// # Errors
/// If there is no such backend, it is not compiled in, the index is no number, or no device has it.
pub fn open(name: &str) -> Result<Device, BackendError> {
    let (backend, index) = match name.split_once(':') {
        None => (name, None),
        Some((backend, index)) => {
            let bad = |_| BackendError::BadIndex { name: name.to_owned() };
            let number = if index == LOCAL_RANK { local_rank() } else { index.parse().map_err(bad)? };
            (backend, Some(number))
        }
    };
    let Some(info) = BACKENDS.iter().find(|info| info.name == backend) else {
        let known = BACKENDS.iter().map(|info| info.name);
        let hint = nearest(backend, known).map_or(String::new(), |near| format!("\nhint: did you mean `{near}`?"));
        return Err(BackendError::Unknown { name: backend.to_owned(), hint });
    };
    if !info.compiled_in {
        return Err(BackendError::NotCompiledIn { name: info.name });
    }
    let device = open_known(info.name, index)?;
    announce(name, &device);
    Ok(device)
}

/// Says once a run which adapter is in use, and warns of one that computes on the CPU.
fn announce(name: &str, device: &Device) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let Some(adapter) = adapter(device) else { return };
    let mut said = SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !said.insert(name.to_owned()) {
        return;
    }
    tracing::info!("backend `{name}` runs on {adapter}");
    if is_software(&adapter) {
        tracing::warn!(
            "{adapter} is a software adapter: it computes on the CPU, far slower than `--backend flex`; good for tests only"
        );
    }
}

/// Opens device `index` of the backend `name`, which is compiled in; without an index the one it likes best.
fn open_known(name: &'static str, index: Option<usize>) -> Result<Device, BackendError> {
    let mut devices = enumerate(name);
    let n_devices = devices.len();
    if n_devices == 0 {
        return Err(BackendError::NoDriver { name, hint: driver_hint(name) });
    }
    match index {
        None => Ok(preferred(name).unwrap_or_else(|| devices.swap_remove(0))),
        Some(index) if index < n_devices => Ok(devices.swap_remove(index)),
        Some(index) => Err(BackendError::NoSuchDevice { name, index, n_devices }),
    }
}

/// The backend's own choice among its devices, where it makes one: for `wgpu`, the strongest.
fn preferred(name: &str) -> Option<Device> {
    match name {
        #[cfg(feature = "wgpu")]
        "wgpu" => Some(Device::wgpu(DeviceKind::DefaultDevice)),
        #[cfg(feature = "vulkan")]
        "vulkan" => Some(Device::vulkan(DeviceKind::DefaultDevice)),
        #[cfg(feature = "metal")]
        "metal" => Some(Device::metal(DeviceKind::DefaultDevice)),
        _ => None,
    }
}

/// The devices of a backend, in its own order; none if it is not compiled in or finds no driver.
fn enumerate(name: &str) -> Vec<Device> {
    match name {
        #[cfg(feature = "flex")]
        "flex" => vec![Device::flex()],
        #[cfg(feature = "ndarray")]
        "ndarray" => {
            // Burn means to drop it for flex. Until then a second, independent CPU backend is worth having in tests.
            #[allow(deprecated)]
            let device = Device::ndarray();
            vec![device]
        }
        #[cfg(feature = "wgpu")]
        "wgpu" => Device::enumerate(DeviceType::Wgpu).into_vec(),
        #[cfg(feature = "vulkan")]
        "vulkan" => Device::enumerate(DeviceType::Vulkan).into_vec(),
        #[cfg(feature = "metal")]
        "metal" => Device::enumerate(DeviceType::Metal).into_vec(),
        #[cfg(feature = "cuda")]
        "cuda" => Device::enumerate(DeviceType::Cuda).into_vec(),
        #[cfg(feature = "cpu")]
        "cpu" => Device::enumerate(DeviceType::Cpu).into_vec(),
        _ => Vec::new(),
    }
}

/// Why a backend could not be opened.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BackendError {
    /// No backend has the name.
    #[error("unknown backend `{name}`, expected one of {}{hint}", names())]
    Unknown {
        /// The name asked for.
        name: String,
        /// A `\nhint: …` line, or nothing.
        hint: String,
    },
    /// The program was built without it.
    #[error(
        "backend `{name}` is not compiled in\nhint: build with its Cargo feature: `cargo build --release --features {name}`"
    )]
    NotCompiledIn {
        /// The backend, which is also the feature's name.
        name: &'static str,
    },
    /// No driver offers it a device.
    #[error("backend `{name}` finds no device on this machine\nhint: {hint}")]
    NoDriver {
        /// The backend.
        name: &'static str,
        /// Its requirements.
        hint: &'static str,
    },
    /// The device cannot compute in it.
    #[error(
        "backend `{name}` cannot compute in {precision}: {reason}\nhint: leave out `--precision`; `--backend list` shows what each device can do"
    )]
    Precision {
        /// The backend and its adapter.
        name: String,
        /// The precision asked for.
        precision: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// The device has no bf16.
    #[error("backend `{name}` cannot hold weights in bf16\nhint: leave out `--trunk`, or use the backend `flex`")]
    Trunk {
        /// The backend and its adapter.
        name: String,
    },
    /// The text after the colon is no number.
    #[error("backend `{name}`: expected NAME or NAME:INDEX, where INDEX is a whole number")]
    BadIndex {
        /// The whole argument.
        name: String,
    },
    /// The backend has fewer devices.
    #[error("backend `{name}` has no device {index}: it found {n_devices}, numbered from 0")]
    NoSuchDevice {
        /// The backend.
        name: &'static str,
        /// The index asked for.
        index: usize,
        /// How many there are.
        n_devices: usize,
    },
}

fn names() -> String {
    BACKENDS.map(|info| format!("`{}`", info.name)).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compiled_in_opens() {
        for info in list().iter().filter(|info| ["flex", "ndarray"].contains(&info.name) && info.compiled_in) {
            let device = open(info.name).expect("compiled in");
            assert_eq!(device, open(&format!("{}:0", info.name)).expect("the same device"));
            assert!(!device.is_autodiff());
        }
    }

    #[test]
    fn the_list_has_a_line_for_every_backend() {
        let table = table();
        for info in list() {
            let line = table.lines().find(|line| line.split([' ', ':']).next() == Some(info.name)).expect("listed");
            assert_eq!(line.contains("not compiled in"), !info.compiled_in, "{line}");
        }
        let host = table.lines().find(|line| line.starts_with("flex")).expect("listed");
        assert!(host.ends_with("f32"), "{host}");
    }

    #[test]
    fn software_adapters_are_known_by_name() {
        assert!(is_software("llvmpipe (LLVM 15.0.6, 256 bits)") && is_software("SwiftShader Device (Subzero)"));
        assert!(!is_software("NVIDIA H200") && !is_software("Apple M2"));
    }

    #[test]
    fn each_refusal_says_why_and_what_to_do() {
        let message = |name: &str| open(name).expect_err("refused").to_string();
        assert_eq!(
            message("fleks"),
            "unknown backend `fleks`, expected one of `flex`, `ndarray`, `wgpu`, `vulkan`, `metal`, `cuda`, `cpu`\n\
             hint: did you mean `flex`?"
        );
        assert_eq!(message("wgpu:a"), "backend `wgpu:a`: expected NAME or NAME:INDEX, where INDEX is a whole number");
        if cfg!(feature = "flex") {
            assert_eq!(message("flex:3"), "backend `flex` has no device 3: it found 1, numbered from 0");
        }
        let flex = Device::flex();
        assert_eq!(
            check_precision("flex", &flex, Precision::F16).expect_err("refused").to_string(),
            "backend `flex` cannot compute in f16: its arithmetic on the CPU is made for f32, and in 16 bits would be \
             slower, not faster\nhint: leave out `--precision`; `--backend list` shows what each device can do"
        );
        check_precision("flex", &flex, Precision::F32).expect("everywhere");
        if !cfg!(feature = "metal") {
            assert_eq!(
                message("metal:1"),
                "backend `metal` is not compiled in\n\
                 hint: build with its Cargo feature: `cargo build --release --features metal`"
            );
        }
    }
}
