//! Low-rank adapters against PEFT: those that it wrote, and those that we write.
//!
//! `fixtures/peft_roundtrip.json` holds what PEFT computes from bases and adapters that *we* wrote, made here from seeds;
//! `oracles/peft_roundtrip.py` renews it.

use common::hf::{AdapterFiles, Base, HostAdapter, HostModel};
use common::model::params::Output;
use common::model::{Adapters, LoraConfig};

use super::*;

/// The folders of `shared/fixtures`.
const ADAPTED: [&str; 3] = ["llama-lora", "qwen2-lora-rslora", "llama-reward-lora"];

/// A base and an adapter for it, as two directories hold them.
struct Pair {
    base: HostModel,
    adapter: HostAdapter,
}

impl Pair {
    fn read(base: &Path, adapter: &Path) -> Self {
        let (base, ..) = hf::read(base).unwrap();
        let files = AdapterFiles::read(adapter).unwrap();
        let (adapter, _) = hf::read_adapter(adapter, &files, &base.config).unwrap();
        Self { base, adapter }
    }

    /// The base as the trunk of whatever stands on it.
    fn trunk(&self, device: &Device) -> Gpt {
        let tensors = &self.base.tensors;
        match self.base.head {
            Head::Lm => Gpt::from_named(&self.base.config, tensors.clone(), device).unwrap(),
            Head::Score { .. } => {
                // Its own head gives way to that of the adapter; a trunk has none.
                let trunk =
                    tensors.iter().filter_map(|(path, t)| Some((path.strip_prefix("trunk.")?.to_owned(), t.clone())));
                let tied = GptConfig { tie_embeddings: true, ..self.base.config.clone() };
                Gpt::from_named(&tied, trunk.collect(), device).unwrap()
            }
        }
    }

    fn gpt(&self, device: &Device, kernels: Kernels) -> Gpt {
        let HostAdapter { adapters, tensors, .. } = &self.adapter;
        self.trunk(&device.clone().inner())
            .with_adapters(adapters, tensors.clone(), device)
            .unwrap()
            .with_kernels(kernels)
    }

    fn scalar(&self, device: &Device, kernels: Kernels) -> ScalarGpt {
        let HostAdapter { adapters, tensors, head: Head::Score { bias } } = &self.adapter else { panic!("a score") };
        let trunk = self.trunk(&device.clone().inner());
        ScalarGpt::with_adapters(trunk, adapters, tensors.clone(), *bias, device).unwrap().with_kernels(kernels)
    }

    /// The language model with the adapter added into its weights.
    fn merged(&self, device: &Device) -> Gpt {
        let mut tensors = self.base.tensors.clone();
        self.adapter.adapters.merge(&self.base.config, Output::Logits, &mut tensors, &self.adapter.tensors);
        Gpt::from_named(&self.base.config, tensors, device).unwrap()
    }

    /// Gradients of the adapter's matrices, under PEFT's names. Nothing else may have any.
    fn gradients(&self, gpt: &Gpt, ids: &[Vec<u32>]) -> (f64, NamedTensors) {
        let (loss, grads) = loss_and_gradients(gpt, ids);
        let tensors: NamedTensors = grads
            .into_iter()
            .map(|(path, grad)| {
                let shape =
                    self.adapter.tensors.get(&path).unwrap_or_else(|| panic!("`{path}` is frozen")).shape.clone();
                (path, HostTensor { shape, ..grad })
            })
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let grads = HostAdapter { tensors, ..self.adapter.clone() };
        hf::write_adapter(dir.path(), gpt.config(), &grads, &Base::default(), &TokenIds::default()).unwrap();
        (loss, hf::read_file(&dir.path().join(hf::ADAPTER_WEIGHTS_FILE), |_| true).unwrap().0)
    }
}

#[test]
fn adapters_of_peft_have_the_same_logits_scores_loss_and_gradients() {
    for folder in ADAPTED {
        let Some(dir) = shared(&format!("fixtures/{folder}")) else { return };
        let expected = json_of(&dir.join("expected.json"));
        let pair = Pair::read(&dir.join("base"), &dir.join("adapter"));
        let ids = ids(&expected["input_ids"]);
        for (place, device, kernels) in places() {
            let name = format!("{folder} on {place}");
            if let Head::Score { .. } = pair.adapter.head {
                let last: Vec<usize> = floats(&expected["lengths"]).iter().map(|&length| length as usize - 1).collect();
                let scores = scores(&pair.scalar(&device, kernels), &ids, &last);
                assert_close(&name, &scores, &floats(&expected["scores"]));
                continue;
            }
            let gpt = pair.gpt(&device.clone().autodiff(), kernels);
            let logits = floats(&expected["logits"]);
            assert_close(&name, &numbers(&gpt.forward(tensor(&ids, &gpt.device()), &Layout::right_padded())), &logits);
            let merged = pair.merged(&device).with_kernels(kernels);
            assert_close(&name, &numbers(&merged.forward(tensor(&ids, &device), &Layout::right_padded())), &logits);
            let (loss, grads) = pair.gradients(&gpt, &ids);
            assert_close(&name, &[loss], &[expected["loss"].as_f64().unwrap()]);
            let statistics = expected["grad_sum_and_norm"].as_object().unwrap();
            assert_eq!(statistics.len(), grads.len(), "{name}");
            for (tensor, statistics) in statistics {
                let grad = &grads[&tensor.replace(".default.", ".")];
                let [sum, norm] = floats(statistics)[..] else { panic!("a sum and a norm") };
                let our_sum: f64 = grad.data.iter().map(|&x| f64::from(x)).sum();
                let our_norm = grad.data.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                assert!((our_norm - norm).abs() <= RELATIVE * norm, "{name}: {tensor}: norm {our_norm}, not {norm}");
                let scale = norm * (grad.data.len() as f64).sqrt();
                assert!((our_sum - sum).abs() <= RELATIVE * scale, "{name}: {tensor}: sum {our_sum}, not {sum}");
            }
        }
    }
}

#[test]
fn an_adapter_of_peft_is_the_same_after_it_was_written() {
    for folder in ADAPTED {
        let Some(dir) = shared(&format!("fixtures/{folder}")) else { return };
        let Pair { base, adapter } = Pair::read(&dir.join("base"), &dir.join("adapter"));
        let written = tempfile::tempdir().unwrap();
        let named = Base { path: Some("somewhere".into()), sha256: Some("abc".into()) };
        hf::write_adapter(written.path(), &base.config, &adapter, &named, &tokens()).unwrap();
        let files = AdapterFiles::read(written.path()).unwrap();
        assert_eq!(
            (&files.base, &files.tokens, &files.config),
            (&named, &tokens(), &Some(base.config.clone())),
            "{folder}"
        );
        let (again, _) = hf::read_adapter(written.path(), &files, &base.config).unwrap();
        assert_eq!(again, adapter, "{folder}");
        let (theirs, ours) = [dir.join("adapter").as_path(), written.path()]
            .map(|dir| hf::read_file(&dir.join(hf::ADAPTER_WEIGHTS_FILE), |_| true).unwrap().0)
            .into();
        assert_eq!(ours, theirs, "{folder}");
    }
}

#[test]
fn what_peft_computes_from_our_adapters_is_what_we_compute() {
    let recorded = json_of(&fixtures().join("peft_roundtrip.json"));
    for (name, model, lora) in adapted() {
        let expected = &recorded["models"][name];
        let dir = tempfile::tempdir().unwrap();
        let pair = write(dir.path(), &model, &lora);
        for (file, hash) in
            [("base/model.safetensors", "base_sha256"), ("adapter/adapter_model.safetensors", "adapter_sha256")]
        {
            let sha256 = sha256_of_file(&dir.path().join(file)).unwrap();
            assert_eq!(json!(sha256), expected[hash], "{name}: {file} has other bytes; renew the fixture");
        }
        assert_eq!(expected["warnings"], json!([]), "{name}");
        for (place, device, kernels) in places() {
            let at = format!("{name} on {place}");
            match model.head {
                Head::Lm => {
                    let gpt = pair.gpt(&device.clone().autodiff(), kernels);
                    let logits = numbers(&gpt.forward(tensor(&model.ids(), &gpt.device()), &Layout::right_padded()));
                    assert_close(&at, &logits, &floats(&expected["logits"]));
                    let (loss, grads) = pair.gradients(&gpt, &model.ids());
                    assert_close(&at, &[loss], &[expected["loss"].as_f64().unwrap()]);
                    let file = format!("peft_roundtrip-{name}.safetensors");
                    check_gradients(&at, &grads, &fixtures().join(file), gpt.config());
                }
                Head::Score { bias } => {
                    let ours = scores(&pair.scalar(&device, kernels), &model.ids(), &model.last());
                    let theirs: Vec<f64> = floats(&expected["scores"]).iter().map(|score| score + bias).collect();
                    assert_close(&at, &ours, &theirs);
                }
            }
        }
    }
}

#[test]
#[ignore = "writes what oracles/peft_roundtrip.py reads; the script runs it"]
fn write_the_adapters_for_the_oracle() {
    let dir = PathBuf::from(std::env::var_os(ORACLE_DIR).expect("the script names the directory"));
    for (name, model, lora) in adapted() {
        let dir = dir.join(name);
        write(&dir, &model, &lora);
        let input = json!({ "input_ids": model.ids(), "last": model.last() });
        std::fs::write(dir.join("input.json"), input.to_string()).unwrap();
    }
}

/// Models of every class with an adapter each; between them every layout of a packed matrix and every setting.
fn adapted() -> Vec<(&'static str, Model, LoraConfig)> {
    let lora = |targets: &[&str]| LoraConfig {
        rank: 3,
        alpha: 6.0,
        targets: targets.iter().map(ToString::to_string).collect(),
        ..LoraConfig::default()
    };
    let stabilised = LoraConfig { rslora: true, rank: 5, ..lora(&["v_proj", "down_proj"]) };
    let settings = [
        ("gpt2", lora(&["all-linear"])),
        ("openai-gpt", lora(&["attn.c_proj", "c_attn", "c_fc"])),
        ("llama", lora(&["q_proj", "v_proj"])),
        ("llama-biased-untied-llama3", lora(&["all-linear"])),
        ("qwen3", stabilised),
        ("gpt-neox", lora(&["query_key_value", "dense_4h_to_h"])),
        ("llama-reward", lora(&["all-linear"])),
        ("gpt2-reward", lora(&["c_attn"])),
    ];
    let mut models: BTreeMap<&str, Model> = models().into_iter().collect();
    settings.into_iter().map(|(name, lora)| (name, models.remove(name).unwrap(), lora)).collect()
}

/// Writes `dir/base` and `dir/adapter`; the base of a reward model is a language model, as in training.
fn write(dir: &Path, model: &Model, lora: &LoraConfig) -> Pair {
    let [base_dir, adapter_dir] = ["base", "adapter"].map(|name| dir.join(name));
    for dir in [&base_dir, &adapter_dir] {
        std::fs::create_dir_all(dir).unwrap();
    }
    let base = Model::new(model.config.clone(), Head::Lm);
    base.write(&base_dir);
    let adapters = hf::adapters_of(&model.config, lora).unwrap();
    let adapter = HostAdapter { tensors: random(&adapters, model), adapters, head: model.head };
    let named = Base { path: Some(base_dir.display().to_string()), sha256: None };
    hf::write_adapter(&adapter_dir, &model.config, &adapter, &named, &tokens()).unwrap();
    Pair::read(&base_dir, &adapter_dir)
}

/// Wide random matrices, so that a wrong part, order or scale shows, and a head's.
fn random(adapters: &Adapters, model: &Model) -> NamedTensors {
    let output = if model.head == Head::Lm { Output::Logits } else { Output::Score };
    let mut tensors = adapters.initial(&model.config, output, &Streams::new(0));
    for (path, tensor) in &mut tensors {
        let mut rng = Streams::new(7).get(path, 0);
        tensor.data.iter_mut().for_each(|x| *x = (0.5 * (2.0 * rng.uniform() - 1.0)) as f32);
    }
    if output == Output::Score {
        tensors.insert("score.weight".into(), model.tensors["score.weight"].clone());
    }
    tensors
}
