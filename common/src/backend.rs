//! A name and an index to a [`Device`]: the only file that names a backend.
//!
//! Backends are Cargo features; several can be compiled in, and `--backend NAME[:INDEX]` chooses when the program
//! runs. Where a GPU backend numbers its devices, the order is the one it lists them in.

use burn::tensor::Device;
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
use burn::tensor::DeviceKind;
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal", feature = "cuda", feature = "cpu"))]
use burn::tensor::DeviceType;

use crate::config::nearest;

/// The backend of a run that names none.
pub const DEFAULT: &str = "flex";

/// A backend this program knows, compiled in or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackendInfo {
    /// What `--backend` calls it, and the Cargo feature that compiles it in.
    pub name: &'static str,
    /// What it runs on.
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

/// Opens the device `NAME[:INDEX]`, without autodiff; training calls [`Device::autodiff`] on it.
///
/// # Errors
/// If there is no such backend, it is not compiled in, the index is no number, or no device has it.
pub fn open(name: &str) -> Result<Device, BackendError> {
    let (backend, index) = match name.split_once(':') {
        None => (name, None),
        Some((backend, index)) => {
            let number = index.parse().map_err(|_| BackendError::BadIndex { name: name.to_owned() })?;
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
    open_known(info.name, index)
}

/// Opens device `index` of the backend `name`, which is compiled in.
fn open_known(name: &'static str, index: Option<usize>) -> Result<Device, BackendError> {
    // The unused arms of a build without a feature fall through to the last one.
    match (name, index) {
        #[cfg(feature = "flex")]
        ("flex", None | Some(0)) => Ok(Device::flex()),
        #[cfg(feature = "ndarray")]
        ("ndarray", None | Some(0)) => {
            // Burn means to drop it for flex. Until then a second, independent CPU backend is worth having in tests.
            #[allow(deprecated)]
            Ok(Device::ndarray())
        }
        #[cfg(feature = "wgpu")]
        ("wgpu", None) => Ok(Device::wgpu(DeviceKind::DefaultDevice)),
        #[cfg(feature = "vulkan")]
        ("vulkan", None) => Ok(Device::vulkan(DeviceKind::DefaultDevice)),
        #[cfg(feature = "metal")]
        ("metal", None) => Ok(Device::metal(DeviceKind::DefaultDevice)),
        #[cfg(feature = "cpu")]
        ("cpu", None) => Ok(Device::cpu()),
        #[cfg(feature = "wgpu")]
        ("wgpu", Some(index)) => numbered(name, index, DeviceType::Wgpu),
        #[cfg(feature = "vulkan")]
        ("vulkan", Some(index)) => numbered(name, index, DeviceType::Vulkan),
        #[cfg(feature = "metal")]
        ("metal", Some(index)) => numbered(name, index, DeviceType::Metal),
        #[cfg(feature = "cuda")]
        ("cuda", index) => numbered(name, index.unwrap_or(0), DeviceType::Cuda),
        #[cfg(feature = "cpu")]
        ("cpu", Some(index)) => numbered(name, index, DeviceType::Cpu),
        (_, index) => Err(BackendError::NoSuchDevice { name, index: index.unwrap_or(0), n_devices: 1 }),
    }
}

/// The device that stands at `index` in the backend's own list.
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal", feature = "cuda", feature = "cpu"))]
fn numbered(name: &'static str, index: usize, kind: DeviceType) -> Result<Device, BackendError> {
    let mut devices = Device::enumerate(kind).into_vec();
    if index >= devices.len() {
        return Err(BackendError::NoSuchDevice { name, index, n_devices: devices.len() });
    }
    Ok(devices.swap_remove(index))
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
    /// What follows the colon is no number.
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
        if !cfg!(feature = "metal") {
            assert_eq!(
                message("metal:1"),
                "backend `metal` is not compiled in\n\
                 hint: build with its Cargo feature: `cargo build --release --features metal`"
            );
        }
    }
}
