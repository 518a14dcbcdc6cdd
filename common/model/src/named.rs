//! Weights by path on the host: what checkpoints are made of.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};
use thiserror::Error;

/// A tensor in main memory, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Size of each axis.
    pub shape: Vec<usize>,
    /// The numbers, `shape.iter().product()` of them.
    pub data: Vec<f32>,
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
pub type NamedTensors = BTreeMap<String, HostTensor>;

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

/// Joins the names that a walk through a module enters.
#[derive(Default)]
pub(crate) struct PathStack(Vec<String>);

impl PathStack {
    pub(crate) fn enter(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }

    pub(crate) fn exit(&mut self) {
        self.0.pop();
    }

    pub(crate) fn path(&self) -> String {
        self.0.join(".")
    }
}

/// The path and shape of every parameter of `module`, in visiting order.
pub fn param_paths<M: Module>(module: &M) -> Vec<(String, Vec<usize>)> {
    #[derive(Default)]
    struct Paths(PathStack, Vec<(String, Vec<usize>)>);
    impl ModuleVisitor for Paths {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.0.enter(name);
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.0.exit();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.push((self.0.path(), param.lazy_shape().to_vec()));
        }
    }
    let mut paths = Paths::default();
    module.visit(&mut paths);
    paths.1
}

/// Copies every parameter of `module` to the host.
pub(crate) fn collect<M: Module>(module: &M) -> NamedTensors {
    #[derive(Default)]
    struct Collect(PathStack, NamedTensors);
    impl ModuleVisitor for Collect {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.0.enter(name);
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.0.exit();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.insert(self.0.path(), HostTensor::of(&param.val()));
        }
    }
    let mut collect = Collect::default();
    module.visit(&mut collect);
    collect.1
}

/// Gives every parameter of `module` its value from `named`.
pub(crate) fn load<M: Module>(module: M, named: NamedTensors) -> Result<M, NamedError> {
    struct Load {
        path: PathStack,
        named: NamedTensors,
        error: Option<NamedError>,
    }
    impl ModuleMapper for Load {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.enter(name);
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let path = self.path.path();
            let (id, blank, mapper) = param.consume();
            let expected = blank.dims().to_vec();
            let value = match self.named.remove(&path) {
                Some(HostTensor { shape, data }) if shape == expected => {
                    let value = Tensor::<D>::from_data(TensorData::new(data, shape), &blank.device());
                    if blank.is_require_grad() { value.require_grad() } else { value }
                }
                Some(HostTensor { shape, .. }) => {
                    self.error.get_or_insert(NamedError::Shape { path, found: shape, expected });
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
    let mut load = Load { path: PathStack::default(), named, error: None };
    let module = module.map(&mut load);
    if let Some(error) = load.error {
        return Err(error);
    }
    match load.named.into_keys().next() {
        Some(path) => Err(NamedError::Unused { path }),
        None => Ok(module),
    }
}
