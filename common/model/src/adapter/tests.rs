use burn::tensor::{Device, Int, Tensor, TensorData};

use super::*;
use crate::loss::cross_entropy;
use crate::optim::{AdamW, Grads, OptimizerConfig};
use crate::{Gpt, Layout, Rotary, ScalarGpt, hf};
use kernels::Kernels;

/// Sums of at most a hundred f32 products of order one, in another order.
const ROUNDING: f32 = 1e-5;

fn configs() -> [GptConfig; 3] {
    let small = |base: GptConfig| GptConfig { d_model: 16, n_layers: 2, n_heads: 4, d_ff: 24, max_seq_len: 12, ..base };
    [
        small(GptConfig::gpt2(19)),
        small(GptConfig { n_kv_heads: Some(2), head_dim: Some(6), ..GptConfig::llama(19) }),
        small(GptConfig { rotary: Rotary { fraction: 0.5, ..Rotary::default() }, ..GptConfig::gpt_neox(19) }),
    ]
}

fn lora(targets: &[&str]) -> LoraConfig {
    let targets = targets.iter().map(ToString::to_string).collect();
    LoraConfig { rank: 3, alpha: 6.0, targets, ..LoraConfig::default() }
}

/// A trunk and adapters whose `B` is not zero.
fn trained(config: &GptConfig, lora: &LoraConfig) -> (Gpt, Adapters, NamedTensors) {
    let adapters = hf::adapters_of(config, lora).expect("known targets");
    let mut tensors = adapters.initial(config, Output::Logits, &Streams::new(1));
    for (path, tensor) in &mut tensors {
        let mut rng = Streams::new(2).get(path, 0);
        tensor.data.iter_mut().for_each(|x| *x += (rng.uniform() - 0.5) as f32);
    }
    (Gpt::new(config, &Streams::new(0), &Device::flex()), adapters, tensors)
}

fn ids(device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i64> = (0..24).map(|i| i * 7 % 19).collect();
    Tensor::from_data(TensorData::new(ids, [2, 12]), device)
}

fn logits(gpt: &Gpt) -> Vec<f32> {
    HostTensor::of(&gpt.forward(ids(&gpt.device()), &Layout::right_padded())).data
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_new_adapter_changes_nothing_and_a_merged_one_computes_the_same() {
    for config in configs() {
        let (trunk, adapters, tensors) = trained(&config, &lora(&["all-linear"]));
        let new = adapters.initial(&config, Output::Logits, &Streams::new(1));
        let adapted = |named| trunk.clone().with_adapters(&adapters, named, &Device::flex()).expect("fits");
        let of_trunk = logits(&trunk);
        let of_new = logits(&adapted(new));
        if config.has_gpt_blocks() {
            // In one piece only without adapters.
            assert!(largest_difference(&of_new, &of_trunk) < ROUNDING);
        } else {
            assert_eq!(of_new, of_trunk, "to the bit: PPO's divergence from its start is zero");
        }
        let of_adapted = logits(&adapted(tensors.clone()));
        assert!(largest_difference(&of_adapted, &of_trunk) > 0.1, "the adapter is to show");
        let mut merged = trunk.to_named();
        adapters.merge(&config, Output::Logits, &mut merged, &tensors);
        let merged = Gpt::from_named(&config, merged, &Device::flex()).expect("fits");
        assert!(largest_difference(&logits(&merged), &of_adapted) < ROUNDING * 10.0);
    }
}

#[test]
fn beside_a_trunk_in_bf16_they_compute_and_learn_the_same_bits() {
    for config in configs() {
        let (trunk, adapters, tensors) = trained(&config, &lora(&["all-linear"]));
        let narrow = trunk.narrowed();
        // The same numbers in f32.
        let wide = Gpt::from_named(&config, narrow.to_named(), &Device::flex()).expect("fits");
        let device = Device::flex().autodiff();
        let learn = |trunk: Gpt, checkpoints: bool| {
            let gpt = trunk.with_adapters(&adapters, tensors.clone(), &device).expect("fits");
            let gpt = gpt.with_checkpoints(checkpoints);
            let hidden = gpt.hidden(ids(&device), &Layout::right_padded()).reshape([24, 16]);
            let targets = Tensor::from_data(TensorData::new(vec![3_i64; 24], [24]), &device);
            let grads = Grads::take(&gpt, cross_entropy(&gpt, hidden, targets, 24).backward()).to_named();
            assert!(grads.keys().eq(tensors.keys()), "{:?}", grads.keys());
            (logits(&gpt), grads)
        };
        let expected = learn(wide, false);
        assert_eq!(learn(narrow.clone(), false), expected);
        assert_eq!(learn(narrow, true), expected);
    }
}

#[test]
fn only_adapters_take_gradients_moments_and_steps() {
    for config in configs() {
        for kernels in [Kernels::Plain, Kernels::Fused] {
            let (trunk, adapters, tensors) = trained(&config, &lora(&["all-linear"]));
            let before = trunk.to_named();
            let device = Device::flex().autodiff();
            let gpt = trunk.with_adapters(&adapters, tensors.clone(), &device).expect("fits").with_kernels(kernels);
            let hidden = gpt.hidden(ids(&device), &Layout::right_padded()).reshape([24, 16]);
            let targets = Tensor::from_data(TensorData::new(vec![3_i64; 24], [24]), &device);
            let grads = Grads::take(&gpt, cross_entropy(&gpt, hidden, targets, 24).backward());
            assert!(grads.to_named().keys().eq(tensors.keys()), "{:?}", grads.to_named().keys());
            let mut optimizer = AdamW::new(&OptimizerConfig::default(), kernels);
            let (gpt, _) = optimizer.step(gpt, grads, 0.1);
            assert_eq!(optimizer.to_named().len(), 2 * tensors.len());
            let after = gpt.to_named();
            assert!(before.iter().all(|(path, tensor)| after[path] == *tensor), "the trunk is frozen");
            let moved = gpt.to_trained();
            assert!(moved.keys().eq(tensors.keys()) && moved.iter().all(|(path, tensor)| tensors[path] != *tensor));
        }
    }
}

#[test]
fn a_reward_models_head_is_trained_with_its_adapters() {
    let [_, config, _] = configs();
    let (trunk, adapters, _) = trained(&config, &lora(&["q_proj"]));
    let mut tensors = adapters.initial(&config, Output::Score, &Streams::new(1));
    tensors.insert("score.weight".into(), HostTensor { shape: vec![1, 16], data: vec![0.5; 16] });
    let device = Device::flex().autodiff();
    let scalar = ScalarGpt::with_adapters(trunk, &adapters, tensors.clone(), 0.25, &device).expect("fits");
    assert_eq!(scalar.to_trained(), tensors);
    let grads = Grads::take(&scalar, scalar.forward(ids(&device), &Layout::right_padded()).sum().backward());
    assert!(grads.to_named().keys().eq(tensors.keys()));
    let zero = scalar.with_zero_head().to_trained();
    assert!(zero["score.weight"].data.iter().all(|&x| x == 0.0) && zero.len() == tensors.len());
}

#[test]
fn dropout_acts_on_the_inputs_of_the_adapters_alone() {
    let [_, config, _] = configs();
    let (trunk, adapters, tensors) = trained(&config, &LoraConfig { dropout: 0.5, ..lora(&["down_proj"]) });
    let gpt = trunk.clone().with_adapters(&adapters, tensors, &Device::flex()).expect("fits");
    let hidden = |gpt: &Gpt, seed| {
        let mut rng = Streams::new(seed).get("dropout", 0);
        HostTensor::of(&gpt.hidden_with_dropout(ids(&gpt.device()), &Layout::right_padded(), Some(&mut rng))).data
    };
    assert_eq!(hidden(&gpt, 1), hidden(&gpt, 1));
    assert_ne!(hidden(&gpt, 1), hidden(&gpt, 2));
    assert_eq!(hidden(&trunk, 1), hidden(&trunk, 2));
}

#[test]
fn initial_values_are_those_of_peft_and_the_same_whatever_else_is_adapted() {
    let [_, config, _] = configs();
    let of = |targets: &[&str]| {
        let adapters = hf::adapters_of(&config, &lora(targets)).expect("known");
        adapters.initial(&config, Output::Logits, &Streams::new(5))
    };
    let (one, all) = (of(&["down_proj"]), of(&["all-linear"]));
    let path = "blocks.1.mlp.down.adapter";
    let (a, b) = (&one[&format!("{path}.a")], &one[&format!("{path}.b")]);
    assert_eq!((a, b), (&all[&format!("{path}.a")], &all[&format!("{path}.b")]));
    assert_eq!((&a.shape, &b.shape), (&vec![24, 3], &vec![3, 16]));
    // Kaiming-uniform with a = √5: 1/√d_in.
    let (bound, largest) = (1.0 / 24f32.sqrt(), a.data.iter().fold(0f32, |m, x| m.max(x.abs())));
    assert!(largest <= bound && largest > 0.8 * bound, "{largest} of {bound}");
    assert!(b.data.iter().all(|&x| x == 0.0));
}

#[test]
fn targets_are_found_by_the_names_of_transformers() {
    let [gpt2, llama, neox] = configs();
    let parts = |config: &GptConfig, targets: &[&str]| hf::adapters_of(config, &lora(targets)).map(|a| a.parts);
    // Queries have 4 heads of 6 channels, keys and values 2.
    let of_llama = parts(&llama, &["q_proj", "v_proj"]).expect("known");
    assert_eq!(of_llama["blocks.0.attention.qkv.weight"], [0..24, 36..48]);
    assert_eq!(of_llama.len(), 2);
    assert_eq!(parts(&llama, &["layers.1.self_attn.k_proj"]).expect("known").len(), 1);
    assert_eq!(parts(&gpt2, &["c_proj"]).expect("known").len(), 4);
    assert_eq!(parts(&gpt2, &["mlp.c_proj"]).expect("known").len(), 2);
    let of_neox = parts(&neox, &["query_key_value"]).expect("known");
    assert_eq!(of_neox["blocks.0.attention.qkv.weight"].first(), Some(&(0..48)), "one matrix, head by head");
    assert_eq!(parts(&neox, &[ALL_LINEAR]).expect("known").len(), 8);
    for unknown in ["q_prj", "proj", "lm_head", "self_attn"] {
        let error = parts(&llama, &["q_proj", unknown]).expect_err("unknown").to_string();
        let expected = format!(
            "`{unknown}` is no linear layer of this model\nhint: targets can be `down_proj`, `gate_proj`, `k_proj`, \
             `o_proj`, `q_proj`, `up_proj`, `v_proj`, or \"all-linear\""
        );
        assert_eq!(error, expected);
    }
}

#[test]
fn settings_out_of_range_are_named() {
    let wrong = |change: fn(&mut LoraConfig)| {
        let mut config = LoraConfig::default();
        change(&mut config);
        config.validate().expect_err("out of range").to_string()
    };
    assert_eq!(LoraConfig::default().validate(), Ok(()));
    assert_eq!(wrong(|c| c.rank = 0), "`lora.rank` must be at least 1, found 0");
    assert_eq!(wrong(|c| c.alpha = 0.0), "`lora.alpha` must be a number above 0, found 0");
    assert_eq!(wrong(|c| c.alpha = f64::NAN), "`lora.alpha` must be a number above 0, found NaN");
    assert_eq!(wrong(|c| c.dropout = 1.0), "`lora.dropout` must be in [0, 1), found 1");
    assert_eq!(wrong(|c| c.targets.clear()), "`lora.targets` must be `\"all-linear\"` or at least one name, found []");
    let stabilised = LoraConfig { rank: 16, alpha: 8.0, rslora: true, ..LoraConfig::default() };
    assert_eq!((stabilised.scale(), LoraConfig { rslora: false, ..stabilised }.scale()), (2.0, 0.5));
}
