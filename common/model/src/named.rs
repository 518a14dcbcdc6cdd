//! Weights by path on the host: what checkpoints are made of.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Element, FloatDType, Tensor, TensorData, bf16};
use thiserror::Error;

use crate::params::{Role, role_of};

/// A tensor in main memory, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor<T = f32> {
    /// Size of each axis.
    pub shape: Vec<usize>,
    /// The numbers, `shape.iter().product()` of them.
    pub data: Vec<T>,
}

impl<T: Element> HostTensor<T> {
    /// The same numbers on `device`, in the same type.
    fn on<const D: usize>(self, device: &Device, dtype: DType) -> Tensor<D> {
        Tensor::from_data(TensorData::new(self.data, self.shape), (device, dtype))
    }
}

impl HostTensor {
    /// A copy of `tensor`.
    ///
    /// # Panics
    /// If the device cannot be read.
    pub fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        let shape = tensor.dims().to_vec();
        let data = tensor.try_to_vec_as::<f32>().expect("the device can be read");
        Self { shape, data }
    }
}

/// Tensors by path, such as `blocks.0.mlp.up.weight`.
pub type NamedTensors<T = f32> = BTreeMap<String, HostTensor<T>>;

/// Why a set of tensors does not fit a model.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NamedError {
    /// The model has a parameter that was not given.
    #[error("tensor `{path}` is missing")]
    Missing {
        /// The parameter's path.
        path: String,
    },
    /// A tensor was given that the model has no place for.
    #[error("tensor `{path}` is not used by this architecture")]
    Unused {
        /// The tensor's path.
        path: String,
    },
    /// A tensor has another shape than the parameter.
    #[error("tensor `{path}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The parameter's path.
        path: String,
        /// The given tensor's shape.
        found: Vec<usize>,
        /// The parameter's shape.
        expected: Vec<usize>,
    },
}

/// Visits every parameter of a module; see [`for_each`].
pub(crate) trait ParamVisitor {
    /// Called with each parameter and its path.
    fn visit<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>);
}

/// Replaces every parameter of a module; see [`map`].
pub(crate) trait ParamMapper {
    /// The parameter that takes the place of `param`, at `path`.
    fn map<const D: usize>(&mut self, path: String, param: Param<Tensor<D>>) -> Param<Tensor<D>>;
}

/// A visitor of modules that knows the path it is at.
struct PathVisitor<'a, F> {
    path: Vec<String>,
    at: &'a mut F,
}

/// Shows every parameter of `module` to `at`, in order.
pub(crate) fn for_each<M: Module>(module: &M, at: &mut impl ParamVisitor) {
    module.visit(&mut PathVisitor { path: Vec::new(), at });
}

/// `module` with its parameters replaced.
pub(crate) fn map<M: Module>(module: M, at: &mut impl ParamMapper) -> M {
    module.map(&mut PathVisitor { path: Vec::new(), at })
}

impl<F: ParamVisitor> ModuleVisitor for PathVisitor<'_, F> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.at.visit(self.path.join("."), param);
    }
}

impl<F: ParamMapper> ModuleMapper for PathVisitor<'_, F> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.at.map(self.path.join("."), param)
    }
}

/// `module` with its parameters on `device`, without gradients; the numbers are shared, not copied, where only autodiff
/// makes the difference.
pub(crate) fn freeze<M: Module>(module: M, device: &Device) -> M {
    struct Freeze<'a>(&'a Device);
    impl ParamMapper for Freeze<'_> {
        fn map<const D: usize>(&mut self, _path: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let (id, value, mapper) = param.consume();
            Param::from_mapped_value(id, on(value, self.0).set_require_grad(false), mapper)
        }
    }
    map(module, &mut Freeze(device))
}

/// `module` with the matrices of its trunk in bf16, rounded to the nearest; see [`Role::may_be_narrow`].
pub(crate) fn narrow<M: Module>(module: M) -> M {
    struct Narrow;
    impl ParamMapper for Narrow {
        fn map<const D: usize>(&mut self, path: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if !role_of(&path).is_some_and(Role::may_be_narrow) {
                return param;
            }
            let (id, value, mapper) = param.consume();
            Param::from_mapped_value(id, value.cast(FloatDType::BF16).set_require_grad(false), mapper)
        }
    }
    map(module, &mut Narrow)
}

/// The same numbers with autodiff or without, as `device` has it.
pub(crate) fn on<const D: usize>(tensor: Tensor<D>, device: &Device) -> Tensor<D> {
    let inner = tensor.inner();
    if device.is_autodiff() { Tensor::from_inner(inner) } else { inner }
}

/// The path and shape of every parameter of `module`, in visiting order.
pub fn param_paths<M: Module>(module: &M) -> Vec<(String, Vec<usize>)> {
    struct Paths(Vec<(String, Vec<usize>)>);
    impl ParamVisitor for Paths {
        fn visit<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
            self.0.push((path, param.lazy_shape().to_vec()));
        }
    }
    let mut paths = Paths(Vec::new());
    for_each(module, &mut paths);
    paths.0
}

/// Copies every parameter of `module` to the host.
pub(crate) fn collect<M: Module>(module: &M) -> NamedTensors {
    collect_where(module, |_| true)
}

/// Copies the parameters of `module` to the host whose paths are `wanted`.
pub(crate) fn collect_where<M: Module>(module: &M, wanted: fn(&str) -> bool) -> NamedTensors {
    struct OnHost {
        wanted: fn(&str) -> bool,
        named: NamedTensors,
    }
    impl ParamVisitor for OnHost {
        fn visit<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
            if (self.wanted)(&path) {
                self.named.insert(path, HostTensor::of(&param.val()));
            }
        }
    }
    let mut on_host = OnHost { wanted, named: NamedTensors::new() };
    for_each(module, &mut on_host);
    on_host.named
}

/// Gives every parameter of `module` its value from `named`.
pub(crate) fn load<M: Module>(module: M, named: NamedTensors) -> Result<M, NamedError> {
    load_where(module, named, |_| true)
}

/// Gives the parameters of `module` whose paths are `wanted` their values from `named`, which holds no others.
pub(crate) fn load_where<M: Module>(module: M, named: NamedTensors, wanted: fn(&str) -> bool) -> Result<M, NamedError> {
    load_both(module, named, NamedTensors::new(), wanted)
}

/// [`load_where`], with tensors that stay in bf16 among those of `named`.
pub(crate) fn load_both<M: Module>(
    module: M,
    named: NamedTensors,
    narrow: NamedTensors<bf16>,
    wanted: fn(&str) -> bool,
) -> Result<M, NamedError> {
    struct Load {
        wanted: fn(&str) -> bool,
        named: NamedTensors,
        narrow: NamedTensors<bf16>,
        error: Option<NamedError>,
    }
    impl ParamMapper for Load {
        fn map<const D: usize>(&mut self, path: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if !(self.wanted)(&path) {
                return param;
            }
            let (id, blank, mapper) = param.consume();
            let expected = blank.dims().to_vec();
            let (wide, narrow) = (self.named.remove(&path), self.narrow.remove(&path));
            let found = wide.as_ref().map(|t| &t.shape).or(narrow.as_ref().map(|t| &t.shape)).cloned();
            let value = match found {
                Some(found) if found == expected => {
                    let device = blank.device();
                    let narrow = narrow.map(|tensor| tensor.on(&device, DType::BF16));
                    let value = wide.map(|tensor| tensor.on(&device, DType::F32)).or(narrow).unwrap_or(blank.clone());
                    if blank.is_require_grad() { value.require_grad() } else { value }
                }
                Some(found) => {
                    self.error.get_or_insert(NamedError::Shape { path, found, expected });
                    blank
                }
                None => {
                    self.error.get_or_insert(NamedError::Missing { path });
                    blank
                }
            };
            Param::from_mapped_value(id, value, mapper)
        }
    }
    let mut load = Load { wanted, named, narrow, error: None };
    let module = map(module, &mut load);
    if let Some(error) = load.error {
        return Err(error);
    }
    match load.named.into_keys().chain(load.narrow.into_keys()).next() {
        Some(path) => Err(NamedError::Unused { path }),
        None => Ok(module),
    }
}
