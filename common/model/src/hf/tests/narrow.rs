//! A frozen trunk in bf16: what is kept so, and how it is rounded.

use burn::tensor::{Int, Tensor, TensorData};

use super::*;
use crate::{Layout, params::role_of};

/// The file in `dir` with the numbers of `tensors` in bf16.
fn write_in_bf16(dir: &Path, tensors: &NamedTensors) {
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let bytes = tensor.data.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
            (name, &tensor.shape, bytes)
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, shape, bytes)| (*name, TensorView::new(Dtype::BF16, (*shape).clone(), bytes).expect("valid")));
    safetensors::serialize_to_file(views, None, &dir.join(WEIGHTS_FILE)).expect("writes");
}

#[test]
fn numbers_between_two_of_bf16_are_rounded_to_the_nearest_and_ties_to_even() {
    let (dir, _) = gpt2();
    let mut tensors = foreign(dir.path());
    let matrix = tensors.get_mut("transformer.h.0.mlp.c_fc.weight").expect("written");
    // Neighbours in bf16 above 1 are 2⁻⁷ apart.
    let step = 1.0 / 128.0;
    let given = [1.0 + 0.4 * step, 1.0 + 0.6 * step, 1.0 + 0.5 * step, 1.0 + 1.5 * step, -1.0 - 1.5 * step];
    matrix.data[..5].copy_from_slice(&given);
    rewrite(dir.path(), &tensors);
    let (model, ..) = read_in(dir.path(), TrunkPrecision::Bf16).expect("reads");
    let rounded: Vec<f32> = model.narrow["blocks.0.mlp.up.weight"].data[..5].iter().map(|x| x.to_f32()).collect();
    assert_eq!(rounded, [1.0, 1.0 + step, 1.0, 1.0 + 2.0 * step, -1.0 - 2.0 * step]);
}

#[test]
fn matrices_and_no_others_stay_in_bf16_of_which_none_is_lost() {
    for config in every_config() {
        for (head, tensors) in [(Head::Lm, lm(&config)), (Head::Score { bias: 0.5 }, scalar(&config))] {
            let dir = tempfile::tempdir().expect("a directory");
            write(dir.path(), &config, head, &tensors, &tokens()).expect("writes");
            write_in_bf16(dir.path(), &foreign(dir.path()));
            let (wide, ..) = read(dir.path()).expect("reads");
            let (model, ..) = read_in(dir.path(), TrunkPrecision::Bf16).expect("reads");
            assert_eq!(model.config, wide.config);
            for (path, expected) in &wide.tensors {
                let is_narrow = role_of(path).is_some_and(Role::may_be_narrow);
                let found = match model.narrow.get(path) {
                    Some(HostTensor { shape, data }) if is_narrow => {
                        HostTensor { shape: shape.clone(), data: data.iter().map(|x| x.to_f32()).collect() }
                    }
                    found => {
                        assert!(found.is_none() && !is_narrow, "{path}");
                        model.tensors[path].clone()
                    }
                };
                assert_eq!(found, *expected, "{path}");
            }
            assert_eq!(model.narrow.len() + model.tensors.len(), wide.tensors.len());
        }
    }
}

#[test]
fn a_model_in_bf16_computes_what_one_in_f32_of_the_same_numbers_does() {
    for config in [GptConfig::gpt2(11), GptConfig::llama(11)].map(|config| tiny(&config)) {
        let dir = tempfile::tempdir().expect("a directory");
        write(dir.path(), &config, Head::Lm, &lm(&config), &tokens()).expect("writes");
        write_in_bf16(dir.path(), &foreign(dir.path()));
        let device = Device::flex();
        let logits = |gpt: &Gpt| {
            let ids = Tensor::<2, Int>::from_data(TensorData::new((0..12).map(|i| i % 11).collect(), [2, 6]), &device);
            HostTensor::of(&gpt.forward(ids, &Layout::right_padded())).data
        };
        let (HostModel { config, tensors, .. }, ..) = read(dir.path()).expect("reads");
        let wide = Gpt::from_named(&config, tensors, &device).expect("fits");
        let (HostModel { config, tensors, narrow, .. }, ..) = read_in(dir.path(), TrunkPrecision::Bf16).expect("reads");
        let narrow = Gpt::from_both(&config, tensors, narrow, &device).expect("fits");
        assert_eq!(logits(&narrow), logits(&wide));
        assert_eq!(logits(&wide.clone().narrowed()), logits(&wide));
    }
}

#[test]
fn a_tied_head_that_is_written_out_is_dropped_in_bf16_too() {
    let (dir, config) = gpt2();
    let mut tensors = foreign(dir.path());
    tensors.insert("lm_head.weight".into(), tensors["transformer.wte.weight"].clone());
    rewrite(dir.path(), &tensors);
    let (model, ..) = read_in(dir.path(), TrunkPrecision::Bf16).expect("reads");
    assert_eq!(model.config, config);
    assert!(!model.narrow.contains_key("head"));
}
