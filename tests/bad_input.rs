//! What every program says when it cannot do what it was asked: a snapshot of the message and the exit code each.
//!
//! Beyond the text, each refusal ends with 1 or 2, begins `error: ` in lower case, and leaves no output behind.

mod config {
    use crate::{Case, models};

    #[test]
    fn files_that_are_no_config() {
        let lab = models();
        lab.write("configs/broken.toml", "seed = 1\ntrain = [\n");
        lab.write("configs/latin1.toml", b"seed = 1 # caf\xe9\n");
        let train = |config| ["train", "--config", config, "--tokenizer", "tokenizer", "--out", "out"];
        Case(&lab, "config-missing").refused("pretrain", &train("configs/nowhere.toml"));
        Case(&lab, "config-directory").refused("pretrain", &train("configs"));
        Case(&lab, "config-broken").refused("pretrain", &train("configs/broken.toml"));
        Case(&lab, "config-not-utf8").refused("pretrain", &train("configs/latin1.toml"));
    }

    #[test]
    fn keys_and_values_that_have_no_place() {
        let lab = models();
        lab.write("configs/key.toml", "seed = 1\n\n[train]\nbatch_sise = 4\n");
        lab.write("configs/section.toml", "[modle]\nd_model = 4\n");
        lab.write("configs/type.toml", "[train]\nsteps = \"many\"\n");
        lab.write("configs/negative.toml", "[train]\nsteps = -1\n");
        lab.write("configs/variant.toml", "[model]\npreset = \"gpt3\"\n");
        let train = |config| ["train", "--config", config, "--tokenizer", "tokenizer", "--out", "out"];
        Case(&lab, "config-unknown-key").refused("pretrain", &train("configs/key.toml"));
        Case(&lab, "config-unknown-section").refused("pretrain", &train("configs/section.toml"));
        Case(&lab, "config-wrong-type").refused("pretrain", &train("configs/type.toml"));
        Case(&lab, "config-negative-count").refused("pretrain", &train("configs/negative.toml"));
        Case(&lab, "config-unknown-variant").refused("pretrain", &train("configs/variant.toml"));
        Case(&lab, "sft-config-unknown-key").refused("sft", &crate::sft(&["--config", "configs/key.toml"])[2..]);
    }

    #[test]
    fn overrides_that_do_not_fit() {
        let lab = models();
        Case(&lab, "set-unknown-key").refused("pretrain", &crate::pretrain(&["--set", "train.stepz=3"]));
        Case(&lab, "set-wrong-type").refused("pretrain", &crate::pretrain(&["--set", "train.steps=many"]));
        Case(&lab, "set-without-value").refused("pretrain", &crate::pretrain(&["--set", "train.steps"]));
        Case(&lab, "set-into-a-number").refused("sft", &crate::sft(&["--set", "seed.x=1"]));
    }

    #[test]
    fn numbers_that_do_not_go_together() {
        let lab = models();
        for (name, setting) in [
            ("heads", "model.n_heads=5"),
            ("odd-width", "model={preset=\"transformer\",d_model=33,n_heads=3}"),
            ("no-layers", "model.n_layers=0"),
            ("dropout", "model.dropout=1.0"),
            ("micro-batch", "train.micro_batch_size=3"),
            ("no-steps", "train.steps=0"),
            ("negative-lr", "optimizer.lr=-0.001"),
            ("infinite-lr", "optimizer.lr=inf"),
            ("betas", "optimizer.betas=[0.9, 1.0]"),
            ("min-lr", "optimizer.min_lr=1.0"),
            ("val-fraction", "data.val_fraction=1.5"),
            ("no-data", "data.train=[]"),
        ] {
            Case(&lab, &format!("value-{name}")).refused("pretrain", &crate::pretrain(&["--set", setting]));
        }
        let tokenizer = ["tokenizer", "--config", "configs/pretrain.toml", "--out", "out"];
        let small = [&tokenizer[..], &["--set", "tokenizer.vocab_size=100"]].concat();
        Case(&lab, "value-vocab-size").refused("pretrain", &small);
        Case(&lab, "value-sft-micro-batch").refused("sft", &crate::sft(&["--set", "train.micro_batch_size=3"]));
        for (name, setting) in [
            ("minibatches", "ppo.minibatches=3"),
            ("micro-batch", "train.micro_batch_size=3"),
            ("gamma", "ppo.gamma=1.5"),
            ("temperature", "ppo.temperature=0.0"),
        ] {
            Case(&lab, &format!("value-ppo-{name}")).refused("ppo", &crate::ppo(&["--set", setting]));
        }
        for (name, setting) in [("samples", "normalisation.samples=1"), ("centring", "train.centring_coef=-1.0")] {
            let args = crate::reward_model(&["--set", setting]);
            Case(&lab, &format!("value-reward-model-{name}")).refused("reward-model", &args);
        }
    }

    #[test]
    fn a_data_directory_that_is_not_named() {
        let lab = models();
        Case(&lab, "data-directory").refused("pretrain", &crate::pretrain(&["--set", "data.train=[\"$DATA/a.txt\"]"]));
    }
}

mod data {
    use crate::{Case, models};

    #[test]
    fn text_that_cannot_be_read() {
        let lab = models();
        lab.write("data/empty.txt", "");
        lab.write("data/blank.txt", "\n  \n\n");
        lab.write("data/latin1.txt", b"a good line\nanother\ncaf\xe9\n");
        lab.write("data/short.txt", "the fox");
        lab.write("data/table.csv", "text\nhello\n");
        lab.write("data/cut.txt.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x4b");
        lab.write("data/no.parquet", "not Parquet");
        for (name, file) in [
            ("missing", "nowhere.txt"),
            ("empty", "empty.txt"),
            ("blank", "blank.txt"),
            ("not-utf8", "latin1.txt"),
            ("short", "short.txt"),
            ("unknown-format", "table.csv"),
            ("cut-gzip", "cut.txt.gz"),
            ("not-parquet", "no.parquet"),
            ("no-extension", "../data"),
        ] {
            let setting = format!("data.train=[\"../data/{file}\"]");
            Case(&lab, &format!("text-{name}")).refused("pretrain", &crate::pretrain(&["-q", "--set", &setting]));
        }
        let eval = ["eval", "--checkpoint", "base", "--data", "data/empty.txt"];
        Case(&lab, "text-eval-empty").refused("pretrain", &eval);
        let tokenizer = ["tokenizer", "--config", "configs/pretrain.toml", "--out", "out", "-q"];
        let empty = [&tokenizer[..], &["--set", "data.train=[\"../data/empty.txt\"]"]].concat();
        Case(&lab, "text-tokenizer-empty").refused("pretrain", &empty);
    }

    #[test]
    fn conversations_that_are_none() {
        let lab = models();
        let good = r#"{"prompt": "hello", "completion": "hi"}"#;
        for (name, line) in [
            ("not-json", r#"{"prompt": "hello", "completion"}"#),
            ("no-object", "[1, 2]"),
            ("without-keys", r#"{"question": "hello", "answer": "hi"}"#),
            ("wrong-type", r#"{"prompt": "hello", "completion": 7}"#),
            ("unknown-role", r#"{"messages": [{"role": "human", "content": "hi"}]}"#),
            ("without-answer", r#"{"messages": [{"role": "user", "content": "hi"}]}"#),
            ("empty-text", r#"{"prompt": "hello", "completion": " "}"#),
        ] {
            lab.write("data/bad.jsonl", format!("{good}\n\n{line}\n"));
            let args = crate::sft(&["--set", "data.train=[\"../data/bad.jsonl\"]"]);
            Case(&lab, &format!("conversation-{name}")).refused("sft", &args);
        }
        lab.write("data/bad.jsonl", [good.as_bytes(), b"\n{\"prompt\": \"caf\xe9\"}\n"].concat());
        let args = crate::sft(&["--set", "data.val=[\"../data/bad.jsonl\"]"]);
        Case(&lab, "conversation-not-utf8").refused("sft", &args);
        lab.write("data/bad.jsonl", "nonsense\nmore\n");
        let skip = ["--set", "data.train=[\"../data/bad.jsonl\"]", "--set", "data.on_bad_record=skip"];
        Case(&lab, "conversation-all-skipped").refused("sft", &crate::sft(&skip));
        lab.write("data/long.jsonl", format!(r#"{{"prompt": "hello", "completion": "{}"}}"#, "ab ".repeat(100)));
        let fail = ["--set", "data.train=[\"../data/long.jsonl\"]", "--set", "data.on_too_long=fail"];
        Case(&lab, "conversation-too-long").refused("sft", &crate::sft(&fail));
        Case(&lab, "conversation-eval-missing").refused("sft", &["eval", "--checkpoint", "sft", "--data", "no.jsonl"]);
    }

    #[test]
    fn pairs_and_prompts_that_are_none() {
        let lab = models();
        for (name, line) in [
            ("without-keys", r#"{"prompt": "a", "chosen": "b"}"#),
            ("equal", r#"{"prompt": "a", "chosen": "b", "rejected": "b"}"#),
            ("no-transcript", r#"{"chosen": "b", "rejected": "c"}"#),
            ("margin", r#"{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}"#),
        ] {
            lab.write("data/bad.jsonl", line);
            let args = crate::reward_model(&["--set", "data.train=[\"../data/bad.jsonl\"]"]);
            Case(&lab, &format!("pair-{name}")).refused("reward-model", &args);
        }
        for (name, line) in [
            ("without-keys", r#"{"text": "a"}"#),
            ("empty", r#"{"prompt": ""}"#),
            ("ends-with-answer", r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#),
            ("too-long", &format!(r#"{{"prompt": "{}"}}"#, "ab ".repeat(30))),
        ] {
            lab.write("data/bad.jsonl", line);
            let args = crate::ppo(&["--set", "data.train=[\"../data/bad.jsonl\"]"]);
            Case(&lab, &format!("prompt-{name}")).refused("ppo", &args);
        }
        lab.write("data/bad.jsonl", r#"{"prompt": "a"}"#);
        let score = ["score", "--checkpoint", "reward", "--data", "data/bad.jsonl"];
        Case(&lab, "score-without-keys").refused("reward-model", &score);
    }

    #[test]
    fn token_ids_that_are_none() {
        let lab = models();
        for (name, text) in [
            ("out-of-range", "[[1, 2], [3, 4000]]"),
            ("negative", "[[-1]]"),
            ("empty-row", "[[1], []]"),
            ("no-rows", "[]"),
            ("not-json", "1 2 3"),
            ("too-long", &format!("[[{}1]]", "1,".repeat(64))),
        ] {
            lab.write("ids.json", text);
            let eval = ["eval", "--checkpoint", "base", "--ids", "ids.json", "--logits"];
            Case(&lab, &format!("ids-{name}")).refused("pretrain", &eval);
        }
        lab.write("ids.json", "[[1, 4000]]");
        Case(&lab, "ids-score-out-of-range").refused("reward-model", &["score", "--checkpoint", "reward", "--ids", "ids.json"]);
        Case(&lab, "ids-missing").refused("pretrain", &["eval", "--checkpoint", "base", "--ids", "no.json"]);
    }
}

mod checkpoints {
    use common::checkpoint::Stage;
    use common::hf;
    use common::testing::{byte_tokenizer, save_tiny};
    use common::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};
    use pipeline_tests::Lab;
    use serde_json::{Value, json};

    use crate::{Case, models};

    const EVAL: [&str; 5] = ["eval", "--checkpoint", "broken", "--ids", "ids.json"];

    /// A lab with the sound checkpoint `broken`, for a test to break.
    fn to_break() -> Lab {
        let lab = models();
        lab.write("ids.json", "[[1, 2]]");
        renew(&lab);
        lab
    }

    fn renew(lab: &Lab) {
        let _ = std::fs::remove_dir_all(lab.path("broken"));
        save_tiny(&lab.path("broken"), Stage::Sft, &byte_tokenizer(), 1);
    }

    /// Changes a JSON file of `broken`.
    fn edit(lab: &Lab, file: &str, change: impl FnOnce(&mut Value)) {
        let path = format!("broken/{file}");
        let mut json = lab.json(&path);
        change(&mut json);
        lab.write(&path, json.to_string());
    }

    /// Writes changed weights under a manifest that does not know their hash, or under none.
    fn edit_weights(lab: &Lab, keep_manifest: bool, change: impl FnOnce(&mut common::model::NamedTensors)) {
        let path = lab.path("broken/model.safetensors");
        let (mut tensors, _) = hf::read_file(&path, |_| true).unwrap();
        change(&mut tensors);
        let views: Vec<(String, safetensors::tensor::TensorView<'_>)>;
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
            .into_iter()
            .map(|(name, tensor)| (name, tensor.shape, tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect()))
            .collect();
        views = bytes
            .iter()
            .map(|(name, shape, bytes)| {
                let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
                (name.clone(), view)
            })
            .collect();
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        if !keep_manifest {
            std::fs::remove_file(lab.path("broken/manifest.json")).unwrap();
        }
    }

    #[test]
    fn directories_that_are_no_checkpoint() {
        let lab = to_break();
        lab.write("notes/readme.txt", "hello");
        Case(&lab, "checkpoint-missing").refused("sft", &crate::sft_from("nowhere"));
        Case(&lab, "checkpoint-no-config").refused("sft", &crate::sft_from("notes"));
        Case(&lab, "checkpoint-is-a-file").refused("chat", &["generate", "--checkpoint", "ids.json", "--prompt", "hi"]);
        Case(&lab, "checkpoint-chat-missing").refused("chat", &["generate", "--checkpoint", "nowhere", "--prompt", "hi"]);
        Case(&lab, "tokenizer-missing").refused("pretrain", &crate::pretrain_with("nowhere"));
        Case(&lab, "tokenizer-none").refused("pretrain", &crate::pretrain_with("notes"));
    }

    #[test]
    fn weights_that_are_damaged() {
        let lab = to_break();
        let weights = lab.bytes("broken/model.safetensors");
        lab.write("broken/model.safetensors", &weights[..weights.len() / 2]);
        Case(&lab, "weights-truncated").refused("pretrain", &EVAL);
        lab.write("broken/model.safetensors", b"");
        Case(&lab, "weights-empty").refused("pretrain", &EVAL);
        lab.write("broken/model.safetensors", b"\xff\xff\xff\xff\xff\xff\xff\xff rubbish");
        Case(&lab, "weights-rubbish").refused("pretrain", &EVAL);
        std::fs::remove_file(lab.path("broken/model.safetensors")).unwrap();
        Case(&lab, "weights-missing").refused("pretrain", &EVAL);

        renew(&lab);
        edit_weights(&lab, true, |tensors| tensors.values_mut().for_each(|tensor| tensor.data[0] += 1.0));
        Case(&lab, "weights-changed").refused("pretrain", &EVAL);
        for (name, value) in [("nan", f32::NAN), ("infinite", f32::INFINITY)] {
            renew(&lab);
            edit_weights(&lab, false, |tensors| {
                tensors.get_mut("transformer.wte.weight").expect("GPT-2's name").data[7] = value;
            });
            Case(&lab, &format!("weights-{name}")).refused("chat", &["generate", "--checkpoint", "broken", "--prompt", "hi"]);
        }
        renew(&lab);
        edit_weights(&lab, false, |tensors| drop(tensors.remove("transformer.ln_f.bias")));
        Case(&lab, "weights-tensor-missing").refused("pretrain", &EVAL);
        renew(&lab);
        edit_weights(&lab, false, |tensors| {
            let tensor = tensors["transformer.ln_f.bias"].clone();
            tensors.insert("transformer.ln_g.bias".into(), tensor);
        });
        Case(&lab, "weights-tensor-unused").refused("pretrain", &EVAL);
        renew(&lab);
        edit(&lab, "config.json", |config| config["n_embd"] = json!(32));
        Case(&lab, "weights-tensor-shape").refused("pretrain", &EVAL);
    }

    #[test]
    fn json_files_that_are_damaged() {
        let lab = to_break();
        lab.write("broken/config.json", "{\"model_type\": \"gpt2\"");
        Case(&lab, "config-json-cut").refused("pretrain", &EVAL);
        for (name, key, value) in [
            ("model-type", "model_type", json!("llama")),
            ("architecture", "architectures", json!(["GPT2Model"])),
            ("heads", "n_head", json!(3)),
            ("missing-key", "n_layer", Value::Null),
            ("huge", "n_embd", json!(1_u64 << 60)),
            ("fraction", "n_embd", json!(15.5)),
        ] {
            renew(&lab);
            edit(&lab, "config.json", |config| config[key] = value);
            Case(&lab, &format!("config-json-{name}")).refused("pretrain", &EVAL);
        }
        renew(&lab);
        lab.write("broken/tokenizer.json", "{\"version\": \"1.0\", \"model\"");
        Case(&lab, "tokenizer-json-cut").refused("pretrain", &EVAL);
        lab.write("broken/tokenizer.json", "{}");
        Case(&lab, "tokenizer-json-empty").refused("sft", &crate::sft_from("broken"));
        renew(&lab);
        edit(&lab, "manifest.json", |manifest| manifest["format"] = json!(2));
        Case(&lab, "manifest-format").refused("pretrain", &EVAL);
        lab.write("broken/manifest.json", "{\"format\": 1, \"stage\": \"dpo\"}");
        Case(&lab, "manifest-damaged").refused("pretrain", &EVAL);
        renew(&lab);
        let text = String::from_utf8(lab.bytes("broken/tokenizer_config.json")).unwrap();
        lab.write("broken/tokenizer_config.json", text.replace("<|end|>", "<|END|>"));
        Case(&lab, "tokenizer-changed").refused("pretrain", &EVAL);
    }

    #[test]
    fn checkpoints_of_another_stage() {
        let lab = models();
        Case(&lab, "stage-sft-from-reward-model").refused("sft", &crate::sft_from("reward"));
        Case(&lab, "stage-policy-is-reward-model").refused("ppo", &crate::ppo_from("reward", "reward"));
        Case(&lab, "stage-policy-is-pretrained").refused("ppo", &crate::ppo_from("base", "reward"));
        Case(&lab, "stage-reward-model-is-sft").refused("ppo", &crate::ppo_from("sft", "sft"));
        Case(&lab, "stage-chat-with-reward-model").refused("chat", &["generate", "--checkpoint", "reward", "--prompt", "hi"]);
        Case(&lab, "stage-score-with-sft").refused("reward-model", &["score", "--checkpoint", "sft", "--data", "data/pairs.val.jsonl"]);
        Case(&lab, "stage-eval-reward-model").refused("pretrain", &["eval", "--checkpoint", "reward", "--data", "data/val.txt"]);
        // Without a manifest there is no stage; what the model is, config.json still says.
        std::fs::remove_file(lab.path("reward/manifest.json")).unwrap();
        Case(&lab, "stage-foreign-reward-model-as-policy").refused("ppo", &crate::ppo_from("reward", "reward"));
    }

    #[test]
    fn tokenizers_that_do_not_fit() {
        let lab = to_break();
        let config = TokenizerConfig { kind: TokenizerKind::Char, ..TokenizerConfig::default() };
        let chars = Tokenizer::train(&config, ["the fox sees a boat?."].iter(), true).unwrap();
        chars.save(&lab.path("chars")).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(lab.path("chars").join(file), lab.path("reward").join(file)).unwrap();
        }
        std::fs::remove_file(lab.path("reward/manifest.json")).unwrap();
        Case(&lab, "tokenizer-of-another").refused("ppo", &crate::ppo_from("sft", "reward"));
        // A manifest knows its tokenizer.
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(lab.path("chars").join(file), lab.path("broken").join(file)).unwrap();
        }
        Case(&lab, "tokenizer-not-the-manifests").refused("sft", &crate::sft_from("broken"));
        renew(&lab);
        let config = TokenizerConfig { vocab_size: 400, ..TokenizerConfig::default() };
        let text = String::from_utf8(lab.bytes("data/train.txt")).unwrap();
        Tokenizer::train(&config, [text].iter(), true).unwrap().save(&lab.path("broken")).unwrap();
        std::fs::remove_file(lab.path("broken/manifest.json")).unwrap();
        Case(&lab, "tokenizer-larger-than-the-model").refused("sft", &crate::sft_from("broken"));
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::remove_file(lab.path("broken").join(file)).unwrap();
        }
        Case(&lab, "tokenizer-absent").refused("chat", &["generate", "--checkpoint", "broken", "--prompt", "hi"]);
        let alien = ["--set", "data.train=[\"../data/alien.txt\"]"];
        lab.write("data/alien.txt", "Ωmega");
        Case(&lab, "tokenizer-unknown-character")
            .refused("pretrain", &[&crate::pretrain_with("chars")[..], &alien, &["-q"]].concat());
    }
}

mod output {
    use std::process::Command;

    use common::checkpoint::Checkpoint;
    use pipeline_tests::{Lab, PRETRAIN, binary};

    use crate::{Case, models};

    #[test]
    fn directories_that_are_in_use() {
        let lab = models();
        lab.write("used/manifest.json", "{}");
        lab.write("thesis/chapter.tex", "");
        lab.write("file", "");
        let into = |out: &'static str| crate::pretrain_into(out, &[]);
        Case(&lab, "out-not-empty").refused("pretrain", &into("used"));
        Case(&lab, "out-is-a-file").refused("pretrain", &into("file"));
        Case(&lab, "out-below-a-file").refused("pretrain", &into("file/run"));
        Case(&lab, "out-below-a-device").refused("pretrain", &into("/dev/null/run"));
        Case(&lab, "overwrite-not-ours").refused("pretrain", &crate::pretrain_into("thesis", &["--overwrite"]));
        assert!(lab.path("thesis/chapter.tex").exists());
        let args = ["train", "--config", "configs/sft.toml", "--init", "base", "--out", "base", "--overwrite"];
        Case(&lab, "overwrite-the-input").refused("sft", &args);
        Checkpoint::open(&lab.path("base")).unwrap();
        let tokenizer = ["tokenizer", "--config", "configs/pretrain.toml", "--out", "thesis", "--overwrite"];
        Case(&lab, "overwrite-not-ours-tokenizer").refused("pretrain", &tokenizer);
    }

    #[test]
    fn runs_that_cannot_be_resumed() {
        let lab = models();
        Case(&lab, "resume-nothing").refused("pretrain", &crate::pretrain_into("nowhere", &["--resume"]));
        Case(&lab, "resume-without-state").refused("pretrain", &crate::pretrain_into("base", &["--resume"]));
        Case(&lab, "resume-another-stage").refused("pretrain", &crate::pretrain_into("sft", &["--resume"]));
        Case(&lab, "resume-and-overwrite").refused("pretrain", &crate::pretrain_into("base", &["--resume", "--overwrite"]));

        lab.ok("pretrain", &crate::pretrain_into("run", &["-q", "--set", "train.steps=2"]));
        let resume = crate::pretrain_into("run", &["--resume", "-q"]);
        let path = "run/state/optimizer.safetensors";
        let mut bytes = lab.bytes(path);
        *bytes.last_mut().unwrap() ^= 1;
        lab.write(path, bytes);
        Case(&lab, "resume-changed-state").refused("pretrain", &resume);
        std::fs::remove_file(lab.path(path)).unwrap();
        Case(&lab, "resume-missing-state").refused("pretrain", &resume);
    }

    /// A limit on the size of files, with the signal that comes with it ignored, is what a program sees of a full disk.
    fn limited(lab: &Lab, blocks: u32, program: &str, args: &[String]) -> pipeline_tests::Output {
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let mut command = Command::new("bash");
        command.args(["-c", &script]).arg(binary(program));
        lab.finish(lab.within(command, args))
    }

    #[test]
    fn a_full_disk_leaves_the_last_checkpoint() {
        let lab = models();
        lab.ok("pretrain", &PRETRAIN.train("out", &["-q", "--set", "train.steps=2"]));
        let before = lab.contents("out");
        let more = ["--resume", "-q", "--set", "train.steps=4"];
        let output = limited(&lab, 16, "pretrain", &PRETRAIN.train("out", &more));
        Case(&lab, "disk-full-save").compare("pretrain (on a full disk)", &output);
        let after = lab.contents("out");
        for (file, content) in &before {
            // The resolved configuration and the metrics of the steps that were made are written before the save.
            assert!(["config.toml", "metrics.jsonl", "samples.jsonl"].contains(&&**file) || after[file] == *content, "`{file}` changed");
        }
        Checkpoint::open(&lab.path("out")).unwrap();
        let names = std::fs::read_dir(lab.dir()).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(names.into_iter().all(|name| !name.to_string_lossy().contains(".tmp-")), "an unfinished save was left");
        lab.ok("pretrain", &PRETRAIN.train("out", &more));
        assert_eq!(lab.saved_step("out"), Some(4));
    }

    #[test]
    fn results_that_cannot_be_printed() {
        let lab = models();
        lab.write("ids.json", "[[1, 2]]");
        for (name, program, args) in [
            ("disk-full-stdout-eval", "pretrain", &["eval", "--checkpoint", "base", "--ids", "ids.json"][..]),
            ("disk-full-stdout-score", "reward-model", &["score", "--checkpoint", "reward", "--ids", "ids.json"]),
            ("disk-full-stdout-chat", "chat", &["generate", "--checkpoint", "sft", "--prompt", "hi", "--max-tokens", "4"]),
        ] {
            let mut command = lab.command(program, args);
            command.stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
            let output = command.output().unwrap();
            let stderr = lab.relative(&String::from_utf8(output.stderr).unwrap());
            let output = pipeline_tests::Output { status: output.status, stdout: String::new(), stderr };
            Case(&lab, name).compare(&format!("{program} {} > /dev/full", args.join(" ")), &output);
        }
    }

    #[test]
    fn a_save_is_refused_where_nothing_may_be_written() {
        let lab = models();
        let tokenizer = ["tokenizer", "--config", "configs/pretrain.toml", "--out", "/dev/null/tokenizer"];
        Case(&lab, "out-below-a-device-tokenizer").refused("pretrain", &tokenizer);
    }
}

mod flags {
    use crate::{Case, models};

    #[test]
    fn devices_that_are_not_there() {
        let lab = models();
        Case(&lab, "backend-unknown").refused("pretrain", &crate::pretrain(&["--backend", "ndarry"]));
        Case(&lab, "backend-not-compiled-in").refused("sft", &crate::sft(&["--backend", "metal"]));
        Case(&lab, "backend-no-such-index").refused("pretrain", &crate::pretrain(&["--backend", "flex:7"]));
        Case(&lab, "backend-bad-index").refused("chat", &["generate", "--checkpoint", "sft", "--prompt", "hi", "--backend", "flex:x"]);
    }

    #[test]
    fn usage_that_clap_refuses() {
        let lab = models();
        Case(&lab, "threads-zero").refused("pretrain", &crate::pretrain(&["--threads", "0"]));
        Case(&lab, "threads-word").refused("pretrain", &crate::pretrain(&["--threads", "all"]));
        Case(&lab, "flag-unknown").refused("pretrain", &crate::pretrain(&["--step", "3"]));
        Case(&lab, "flag-missing").refused("sft", &["train", "--config", "configs/sft.toml"]);
        Case(&lab, "flag-quiet-and-verbose").refused("sft", &crate::sft(&["-q", "-v"]));
        Case(&lab, "command-unknown").refused("pretrain", &["trian"]);
        Case(&lab, "eval-without-input").refused("pretrain", &["eval", "--checkpoint", "base"]);
        Case(&lab, "eval-two-inputs").refused("pretrain", &["eval", "--checkpoint", "base", "--data", "a.txt", "--ids", "b.json"]);
        Case(&lab, "eval-logits-of-text").refused("pretrain", &["eval", "--checkpoint", "base", "--data", "a.txt", "--logits"]);
        Case(&lab, "kernels-unknown").refused("pretrain", &crate::pretrain(&["--kernels", "fast"]));
        Case(&lab, "ppo-eval-temperature").refused("ppo", &[
            "eval", "--checkpoint", "sft", "--reference", "sft", "--reward-model", "reward", "--data",
            "data/prompts.val.jsonl", "--temperature", "0",
        ]);
    }

    #[test]
    fn answers_that_cannot_be_given() {
        let lab = models();
        let generate = |more: &[&'static str]| [&["generate", "--checkpoint", "sft"], more].concat();
        for (name, more) in [
            ("temperature", &["--prompt", "hi", "--temperature", "-1"][..]),
            ("top-p", &["--prompt", "hi", "--top-p", "1.5"]),
            ("top-k", &["--prompt", "hi", "--top-k", "-1"]),
            ("repetition-penalty", &["--prompt", "hi", "--repetition-penalty", "0"]),
            ("max-tokens", &["--prompt", "hi", "--max-tokens", "0"]),
            ("beams-and-top-k", &["--prompt", "hi", "--beams", "2", "--top-k", "3"]),
            ("length-penalty", &["--prompt", "hi", "--length-penalty", "2"]),
            ("empty-stop", &["--prompt", "hi", "--stop", ""]),
            ("empty-prompt", &["--prompt", " "]),
            ("system-and-raw", &["--prompt", "hi", "--raw", "--system", "be kind"]),
        ] {
            Case(&lab, &format!("chat-{name}")).refused("chat", &generate(more));
        }
        let long = "a long prompt ".repeat(10);
        for (name, more) in [("over-long-prompt", &[][..]), ("over-long-raw-prompt", &["--raw"])] {
            let args = [&["generate", "--checkpoint", "sft", "--prompt", &long], more].concat();
            Case(&lab, &format!("chat-{name}")).refused("chat", &args);
        }
    }
}

mod special_tokens {
    use common::testing::byte_tokenizer;
    use pipeline_tests::Lab;

    use crate::models;

    const SPELLED: &str = "<|bos|> <|end|> <|assistant|><|pad|> <|user|>";

    fn prompt_ids(lab: &Lab, more: &[&str]) -> Vec<u32> {
        let args = ["generate", "--checkpoint", "sft", "--prompt", SPELLED, "--json", "--max-tokens", "1"];
        let answer: serde_json::Value = serde_json::from_str(&lab.ok("chat", &[&args[..], more].concat())).unwrap();
        serde_json::from_value(answer["prompt_token_ids"].clone()).unwrap()
    }

    #[test]
    fn a_prompt_that_spells_them_has_only_those_of_the_conversation() {
        let lab = models();
        let specials = byte_tokenizer().specials();
        let all = [specials.bos, specials.pad, specials.system, specials.user, specials.assistant, specials.end];
        let found = |ids: &[u32]| ids.iter().copied().filter(|id| all.contains(id)).collect::<Vec<_>>();
        let ids = prompt_ids(&lab, &[]);
        assert_eq!(found(&ids), [specials.bos, specials.user, specials.end, specials.assistant]);
        assert_eq!(ids.len(), SPELLED.len() + 4, "every other token is a byte of the text");
        let raw = prompt_ids(&lab, &["--raw"]);
        assert_eq!((found(&raw), raw.len()), (vec![specials.bos], SPELLED.len() + 1));
    }

    #[test]
    fn every_stage_trains_on_text_that_spells_them() {
        let lab = models();
        let text = format!("{SPELLED} once\n\n").repeat(40);
        lab.write("data/train.txt", &text);
        lab.write("data/val.txt", &text);
        let short = "<|end|> <|bos|>";
        let json = |value: serde_json::Value| format!("{value}\n").repeat(8);
        for set in ["train", "val"] {
            let conversation = serde_json::json!({ "prompt": short, "completion": "<|end|>" });
            lab.write(&format!("data/sft.{set}.jsonl"), json(conversation));
            let pair = serde_json::json!({ "prompt": short, "chosen": "<|end|>", "rejected": "<|pad|>" });
            lab.write(&format!("data/pairs.{set}.jsonl"), json(pair));
            lab.write(&format!("data/prompts.{set}.jsonl"), json(serde_json::json!({ "prompt": short })));
        }
        let few = ["-q", "--set", "train.steps=2"];
        lab.ok("pretrain", &crate::pretrain(&few));
        let measured = lab.ok("pretrain", &["eval", "--checkpoint", "base", "--data", "data/val.txt"]);
        let measured: serde_json::Value = serde_json::from_str(&measured).unwrap();
        // Byte by byte, after one `<|bos|>` a document: were a special token made of the text, there would be fewer.
        let document = SPELLED.len() + " once".len() + 1;
        assert_eq!(measured["tokens"], document * 40 - 1);
        lab.ok("sft", &crate::sft_into("out-sft", &few));
        lab.ok("reward-model", &crate::reward_model_into("out-reward", &few));
        lab.ok("ppo", &crate::ppo_into("out-ppo", &few));
    }
}

use common::checkpoint::Stage;
use common::testing::{byte_tokenizer, save_tiny};
use pipeline_tests::{Lab, Output, PPO, PRETRAIN, REWARD_MODEL, SFT, assert_snapshot};

/// A lab with an untrained checkpoint of every stage.
fn models() -> Lab {
    let lab = Lab::new();
    let tokenizer = byte_tokenizer();
    tokenizer.save(&lab.path("tokenizer")).unwrap();
    save_tiny(&lab.path("base"), Stage::Pretrain, &tokenizer, 1);
    save_tiny(&lab.path("sft"), Stage::Sft, &tokenizer, 2);
    save_tiny(&lab.path("reward"), Stage::RewardModel, &tokenizer, 3);
    lab
}

fn pretrain(more: &[&str]) -> Vec<String> {
    pretrain_into("out", more)
}

fn pretrain_into(out: &str, more: &[&str]) -> Vec<String> {
    PRETRAIN.train(out, more)
}

fn pretrain_with<'a>(tokenizer: &'a str) -> Vec<&'a str> {
    vec!["train", "--config", "configs/pretrain.toml", "--out", "out", "--tokenizer", tokenizer]
}

fn sft(more: &[&str]) -> Vec<String> {
    sft_into("out", more)
}

fn sft_into(out: &str, more: &[&str]) -> Vec<String> {
    SFT.train(out, more)
}

fn sft_from(init: &str) -> Vec<&str> {
    vec!["train", "--config", "configs/sft.toml", "--out", "out", "--init", init]
}

fn reward_model(more: &[&str]) -> Vec<String> {
    reward_model_into("out", more)
}

fn reward_model_into(out: &str, more: &[&str]) -> Vec<String> {
    REWARD_MODEL.train(out, more)
}

fn ppo(more: &[&str]) -> Vec<String> {
    ppo_into("out", more)
}

fn ppo_into(out: &str, more: &[&str]) -> Vec<String> {
    PPO.train(out, more)
}

fn ppo_from<'a>(policy: &'a str, reward_model: &'a str) -> Vec<&'a str> {
    vec!["train", "--config", "configs/ppo.toml", "--out", "out", "--policy", policy, "--reward-model", reward_model]
}

/// Something a program has to refuse, and the name of the snapshot.
struct Case<'a>(&'a Lab, &'a str);

impl Case<'_> {
    /// Runs the program and compares exit code and stderr with the snapshot.
    #[track_caller]
    fn refused(&self, program: &str, args: &[impl AsRef<str>]) {
        let output = self.0.run(program, args);
        let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        self.compare(&format!("{program} {}", args.join(" ")), &output);
        assert!(!self.0.path("out").exists(), "{}: `--out` was made although nothing was done", self.1);
    }

    #[track_caller]
    fn compare(&self, command: &str, output: &Output) {
        let Self(_, name) = self;
        let stderr = &output.stderr;
        let code = output.status.code();
        assert!(matches!(code, Some(1 | 2)), "{name}: {:?}\n{stderr}", output.status);
        assert_eq!(output.stdout, "", "{name}: a refusal has no result");
        let message = stderr.lines().find_map(|line| line.strip_prefix("error: "));
        let message = message.unwrap_or_else(|| panic!("{name}: no error is told:\n{stderr}"));
        assert!(!message.starts_with(char::is_uppercase), "{name}: `{message}` begins with a capital");
        assert!(!message.ends_with('.'), "{name}: `{message}` ends with a full stop");
        assert!(!stderr.contains("panicked"), "{name}: {stderr}");
        let code = code.unwrap_or_default();
        assert_snapshot(name, &format!("$ {command}\nexit {code}\n{stderr}"));
    }
}
