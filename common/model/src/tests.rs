//! What must hold for every architecture, on both CPU backends.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};

use super::optim::Grads;
use super::{Cache, Gpt, GptConfig, Layout, NormPlacement, Positions, ScalarGpt};
use base::rng::Streams;
use kernels::Kernels;

/// Two ways to the same number differ by float32 rounding of sums of at most a few hundred terms of order 1.
const ROUNDING: f32 = 1e-5;

fn configs() -> Vec<GptConfig> {
    let small = |base: GptConfig| GptConfig { d_model: 16, n_layers: 2, n_heads: 2, d_ff: 32, max_seq_len: 24, ..base };
    let transformer = small(GptConfig::transformer(19));
    let gpt2 = small(GptConfig::gpt2(19));
    vec![
        GptConfig { tie_embeddings: false, ..transformer.clone() },
        GptConfig { norm: NormPlacement::Pre, ..transformer.clone() },
        GptConfig { positions: Positions::Sinusoidal, tie_embeddings: false, ..gpt2.clone() },
        transformer,
        gpt2,
    ]
}

#[allow(deprecated)] // Burn deprecates ndarray; users still compare against it.
fn devices() -> Vec<Device> {
    vec![Device::flex(), Device::ndarray()]
}

fn each(check: impl Fn(&Gpt, &Device)) {
    for device in devices() {
        for config in configs() {
            for kernels in [Kernels::Plain, Kernels::Fused] {
                check(&Gpt::new(&config, &Streams::new(3), &device).with_kernels(kernels), &device);
            }
        }
    }
}

fn ids(rows: &[Vec<i64>], device: &Device) -> Tensor<2, Int> {
    let shape = [rows.len(), rows[0].len()];
    Tensor::from_data(TensorData::new(rows.concat(), shape), device)
}

fn random_ids(n: usize, seed: u64) -> Vec<i64> {
    let mut rng = Streams::new(seed).get("ids", 0);
    (0..n).map(|_| rng.below(19) as i64).collect()
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().expect("the device can be read")
}

fn assert_near(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(worst < ROUNDING, "largest difference {worst}");
}

#[test]
fn later_tokens_never_move_earlier_logits() {
    each(|gpt, device| {
        let first = random_ids(9, 1);
        let mut second = first.clone();
        second[6] = (second[6] + 1) % 19;
        let logits = |row: Vec<i64>| values(gpt.forward(ids(&[row], device), &Layout::right_padded()));
        let (a, b) = (logits(first), logits(second));
        assert_near(&a[..6 * 19], &b[..6 * 19]);
        assert!(a[6 * 19..] != b[6 * 19..], "the changed token changes nothing");
    });
}

#[test]
fn padding_behind_a_row_equals_none() {
    each(|gpt, device| {
        let (short, long) = (random_ids(5, 2), random_ids(9, 3));
        let mut padded = short.clone();
        padded.resize(9, 0);
        let alone = values(gpt.forward(ids(&[short], device), &Layout::right_padded()));
        let both = values(gpt.forward(ids(&[padded, long.clone()], device), &Layout::right_padded()));
        assert_near(&alone, &both[..5 * 19]);
        let long = values(gpt.forward(ids(&[long], device), &Layout::right_padded()));
        assert_near(&long, &both[9 * 19..]);
    });
}

#[test]
fn a_packed_document_sees_only_itself() {
    each(|gpt, device| {
        let (a, b) = (random_ids(5, 4), random_ids(7, 5));
        let packed = [a.clone(), b.clone()].concat();
        let layout = Layout::packed([vec![0; 5], vec![5; 7]].concat(), 12);
        let together = values(gpt.forward(ids(&[packed], device), &layout));
        let alone = [a, b].map(|row| values(gpt.forward(ids(&[row], device), &Layout::right_padded()))).concat();
        assert_near(&alone, &together);
    });
}

#[test]
fn cached_decoding_equals_the_full_forward() {
    each(|gpt, device| {
        let rows = vec![random_ids(12, 6), random_ids(12, 7), random_ids(12, 15)];
        let full = values(gpt.hidden(ids(&rows, device), &Layout::right_padded()));
        let expected = |row: usize, t: usize| &full[(row * 12 + t) * 16..][..16];
        let mut cache = Cache::new(gpt, 3, 12);
        // Prompts of 6, 3 and 1 tokens, read together and padded behind.
        let lens = [6, 3, 1];
        let prompts: Vec<Vec<i64>> = rows.iter().map(|row| row[..6].to_vec()).collect();
        gpt.decode(ids(&prompts, device), &mut cache);
        (0..3).for_each(|row| cache.truncate(row, lens[row]));
        for t in 0..6 {
            let next: Vec<Vec<i64>> = rows.iter().zip(lens).map(|(row, len)| vec![row[len + t]]).collect();
            let hidden = values(gpt.decode(ids(&next, device), &mut cache));
            for (row, hidden) in hidden.chunks(16).enumerate() {
                assert_near(hidden, expected(row, lens[row] + t));
            }
        }
        assert_eq!(cache.lens(), [12, 9, 7]);
    });
}

#[test]
fn kept_and_replaced_rows_continue_as_they_were() {
    each(|gpt, device| {
        let rows = vec![random_ids(4, 8), random_ids(4, 9), random_ids(4, 10)];
        let mut cache = Cache::new(gpt, 3, 5);
        gpt.decode(ids(&rows, device), &mut cache);
        cache.truncate(1, 2);
        let mut kept = cache.clone();
        kept.keep_rows(&[2, 1, 1]);
        // A row more, then others' keys and values in the place of two.
        let mut mixed = cache.clone();
        mixed.append(Cache::new(gpt, 1, 5));
        let mut short = Cache::new(gpt, 2, 4);
        gpt.decode(ids(&[rows[2].clone(), rows[0].clone()], device), &mut short);
        mixed.replace_rows(&[0, 3], &short);
        assert_eq!((kept.lens(), mixed.lens()), (&[4, 2, 2][..], &[4, 2, 4, 4][..]));

        let all = values(gpt.decode(ids(&[vec![1], vec![2], vec![3]], device), &mut cache));
        let some = values(gpt.decode(ids(&[vec![3], vec![2], vec![2]], device), &mut kept));
        assert_near(&[&all[32..], &all[16..32], &all[16..32]].concat(), &some);
        let some = values(gpt.decode(ids(&[vec![3], vec![2], vec![3], vec![1]], device), &mut mixed));
        assert_near(&[&all[32..], &all[16..32], &all[32..], &all[..16]].concat(), &some);
    });
}

#[test]
fn weights_survive_the_way_over_the_host() {
    each(|gpt, device| {
        let named = gpt.to_named();
        let again = Gpt::from_named(gpt.config(), named.clone(), device).expect("the model's own weights");
        assert_eq!(again.to_named(), named);
        let scalar = ScalarGpt::new(again, &Streams::new(0)).with_score_bias(0.5);
        let copy = ScalarGpt::from_named(gpt.config(), scalar.to_named(), 0.5, device).expect("its own weights");
        let input = || ids(&[random_ids(6, 11)], device);
        assert_eq!(
            values(scalar.forward(input(), &Layout::right_padded())),
            values(copy.forward(input(), &Layout::right_padded()))
        );
    });
}

#[test]
fn a_missing_unused_or_misshapen_tensor_is_named() {
    let device = Device::flex();
    let config = &configs()[4];
    let named = Gpt::new(config, &Streams::new(0), &device).to_named();
    let error = |change: &dyn Fn(&mut super::NamedTensors)| {
        let mut named = named.clone();
        change(&mut named);
        Gpt::from_named(config, named, &device).expect_err("wrong weights").to_string()
    };
    assert_eq!(error(&|n| drop(n.remove("final_norm.beta"))), "tensor `final_norm.beta` is missing");
    let extra = super::HostTensor { shape: vec![1], data: vec![0.0] };
    let unused = "tensor `blocks.9.mlp.up.bias` is not used by this architecture";
    assert_eq!(error(&|n| drop(n.insert("blocks.9.mlp.up.bias".into(), extra.clone()))), unused);
    let shape = "tensor `blocks.1.mlp.up.bias` has shape [1], expected [32]";
    assert_eq!(error(&|n| drop(n.insert("blocks.1.mlp.up.bias".into(), extra.clone()))), shape);
}

#[test]
fn initial_weights_are_the_same_on_every_backend() {
    for config in configs() {
        let [a, b] = [0, 1].map(|i| Gpt::new(&config, &Streams::new(5), &devices()[i]).to_named());
        assert_eq!(a, b);
    }
}

#[test]
fn gradients_reach_every_parameter() {
    each(|gpt, device| {
        let device = device.clone().autodiff();
        let gpt = Gpt::from_named(gpt.config(), gpt.to_named(), &device).expect("same").with_kernels(gpt.kernels());
        let hidden = gpt.hidden(ids(&[random_ids(8, 12)], &device), &Layout::right_padded());
        let targets = Tensor::from_data(TensorData::new(random_ids(8, 13), [8]), &device);
        let loss = crate::loss::cross_entropy(&gpt, hidden.reshape([8, 16]), targets, 8);
        let grads = crate::optim::Grads::take(&gpt, loss.backward()).to_named();
        let paths: Vec<String> = super::param_paths(&gpt).into_iter().map(|(path, _)| path).collect();
        assert_eq!(grads.len(), paths.len());
        for path in paths {
            assert!(grads[&path].data.iter().any(|g| *g != 0.0), "no gradient reaches `{path}`");
        }
    });
}

#[test]
fn dropout_keeps_the_mean_and_follows_its_stream() {
    let device = Device::flex();
    let config = GptConfig { dropout: 0.2, ..configs()[3].clone() };
    let gpt = Gpt::new(&config, &Streams::new(1), &device);
    let hidden = |index| {
        let mut rng = Streams::new(2).get("dropout", index);
        let input = ids(&[random_ids(10, 14)], &device);
        values(gpt.hidden_with_dropout(input, &Layout::right_padded(), Some(&mut rng)))
    };
    assert_eq!(hidden(0), hidden(0));
    assert_ne!(hidden(0), hidden(1));
    assert_eq!(gpt.valid().config(), gpt.config());
}

#[test]
fn a_head_of_zeros_still_learns() {
    let autodiff = Device::flex().autodiff();
    let gpt = Gpt::new(&GptConfig { d_model: 16, n_layers: 1, ..GptConfig::gpt2(19) }, &Streams::new(3), &autodiff);
    let scalar = ScalarGpt::new(gpt, &Streams::new(0)).with_score_bias(0.5).with_zero_head();
    let ids = Tensor::<1, Int>::from_data([4, 7, 1], &autodiff).reshape([1, 3]);
    let scores = scalar.forward(ids, &Layout::right_padded());
    let grads = Grads::take(&scalar, scores.sub_scalar(1.0).square().sum().backward());
    let head = &grads.to_named()["score.weight"];
    assert!(head.data.iter().any(|&gradient| gradient != 0.0), "{head:?}");
}
