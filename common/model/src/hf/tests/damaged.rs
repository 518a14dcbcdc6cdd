use super::*;

#[test]
fn a_tensor_that_is_missing_unused_misshapen_or_not_finite_is_named() {
    let (dir, _) = gpt2();
    let good = foreign(dir.path());
    let changed = |change: fn(&mut NamedTensors)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        rewrite(dir.path(), &tensors);
        message(dir.path())
    };
    assert_eq!(
        changed(|t| drop(t.remove("transformer.h.1.mlp.c_fc.bias"))),
        "`DIR/model.safetensors`: tensor `transformer.h.1.mlp.c_fc.bias` is missing\nhint: the files of this directory are not of one model; copy or download them again"
    );
    assert_eq!(
        changed(|t| drop(t.insert("transformer.h.2.ln_1.bias".into(), HostTensor { shape: vec![1], data: vec![0.0] }))),
        "`DIR/model.safetensors`: tensor `transformer.h.2.ln_1.bias` is not used by the model that config.json describes"
    );
    assert_eq!(
        changed(|t| t.get_mut("transformer.wte.weight").expect("there").shape = vec![8, 11]),
        "`DIR/model.safetensors`: tensor `transformer.wte.weight` has shape [8, 11], expected [11, 8]\nhint: the files of this directory are not of one model; copy or download them again"
    );
    // `write_file` refuses such a number, so it is put into the bytes.
    rewrite(dir.path(), &good);
    let path = dir.path().join(WEIGHTS_FILE);
    let mut bytes = fs::read(&path).expect("there");
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).expect("writes");
    assert_eq!(
        message(dir.path()),
        "`DIR/model.safetensors`: tensor `transformer.wte.weight` holds NaN; every number must be finite"
    );
    let mut tensors = good.clone();
    tensors.get_mut("transformer.wte.weight").expect("there").data[0] = f32::INFINITY;
    let named = tensors.iter().map(|(name, tensor)| (name.clone(), tensor));
    let refused = write_file(&path, named).expect_err("not finite").to_string();
    assert!(refused.contains("tensor `transformer.wte.weight` holds inf"), "{refused}");
}

#[test]
fn a_truncated_damaged_or_absent_file_is_named() {
    let (dir, _) = gpt2();
    let path = dir.path().join(WEIGHTS_FILE);
    let whole = fs::read(&path).expect("there");
    for length in [0, 4, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).expect("writes");
        let message = message(dir.path());
        assert!(message.starts_with("`DIR/model.safetensors` is damaged or cut short: "), "{length}: {message}");
    }
    fs::write(&path, "not a safetensors file at all").expect("writes");
    assert!(message(dir.path()).contains("is damaged or cut short"));
    fs::rename(&path, dir.path().join("pytorch_model.bin")).expect("moved");
    assert!(message(dir.path()).starts_with("no weights in `DIR`: expected `model.safetensors` or"));
    assert!(message(dir.path()).contains("hint: `pytorch_model.bin` is not read"));
    fs::write(dir.path().join(CONFIG_FILE), "{").expect("writes");
    assert!(message(dir.path()).starts_with("`DIR/config.json` is damaged or cut short: "));
    fs::remove_file(dir.path().join(CONFIG_FILE)).expect("removed");
    assert!(message(dir.path()).starts_with("cannot read `DIR/config.json`"));
}

/// A file with this header, whatever it claims, and `n_bytes` of tensors.
fn write_header(dir: &Path, header: &str, n_bytes: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.resize(bytes.len() + n_bytes, 0);
    fs::write(dir.join(WEIGHTS_FILE), bytes).expect("writes");
}

#[test]
fn a_header_that_lies_is_refused_before_anything_is_allocated() {
    let (dir, _) = gpt2();
    let tensor = |shape: &str, start: u64, end: u64| {
        format!("{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}")
    };
    let one = |shape: &str, start, end| format!("{{\"transformer.wte.weight\":{}}}", tensor(shape, start, end));
    let huge = u64::MAX;
    for (header, n_bytes) in [
        // Overlapping, with a gap, backwards, beyond the end.
        (format!("{{\"a\":{},\"b\":{}}}", tensor("[2]", 0, 8), tensor("[2]", 4, 12)), 12),
        (format!("{{\"a\":{},\"b\":{}}}", tensor("[1]", 0, 4), tensor("[1]", 8, 12)), 12),
        (one("[1]", 4, 0), 4),
        (one("[4]", 0, 16), 8),
        // Products that overflow, sizes that do not fit the shape.
        (one(&format!("[{huge},{huge}]"), 0, 8), 8),
        (one(&format!("[{},4]", 1u64 << 62), 0, 8), 8),
        (one("[3]", 0, 8), 8),
        (one("[2]", 0, huge), 8),
        (one("[-1]", 0, 8), 8),
        ("{\"a\":{\"dtype\":\"F99\",\"shape\":[1],\"data_offsets\":[0,4]}}".to_owned(), 4),
        ("[".repeat(100_000), 0),
        (String::new(), 0),
    ] {
        write_header(dir.path(), &header, n_bytes);
        let message = message(dir.path());
        assert!(message.starts_with("`DIR/model.safetensors` is damaged or cut short: "), "{header}: {message}");
    }
    for n_header in [huge, 1 << 40, 100_000_001, 9] {
        let mut bytes = u64::to_le_bytes(n_header).to_vec();
        bytes.extend(b"{}");
        fs::write(dir.path().join(WEIGHTS_FILE), bytes).expect("writes");
        let expected = format!("its header has {n_header} bytes, the file 10");
        assert!(message(dir.path()).contains(&expected));
    }
}

/// Shapes are compared before tensors are read: what config.json asks for is never allocated for weights of another size.
#[test]
fn a_sparse_file_of_a_terabyte_is_refused_by_its_shapes() {
    let (dir, _) = gpt2();
    let n_bytes = 4u64 << 38;
    let header = format!(
        "{{\"transformer.wte.weight\":{{\"dtype\":\"F32\",\"shape\":[11,{}],\"data_offsets\":[0,{}]}}}}",
        n_bytes / 44,
        n_bytes / 44 * 44
    );
    write_header(dir.path(), &header, 0);
    let file = fs::OpenOptions::new().write(true).open(dir.path().join(WEIGHTS_FILE)).expect("opens");
    if file.set_len(8 + header.len() as u64 + n_bytes / 44 * 44).is_err() {
        return; // a file system without sparse files
    }
    assert!(message(dir.path()).contains("tensor `transformer.wte.weight` has shape [11, "));
}

#[test]
fn a_file_that_is_not_a_file_is_refused() {
    let (dir, _) = gpt2();
    let index = json!({ "weight_map": { "transformer.wte.weight": "shard" } });
    fs::remove_file(dir.path().join(WEIGHTS_FILE)).expect("removed");
    fs::write(dir.path().join(INDEX_FILE), index.to_string()).expect("writes");
    fs::create_dir(dir.path().join("shard")).expect("created");
    assert_eq!(message(dir.path()), "cannot read `DIR/shard`: it is not a regular file");
    #[cfg(unix)]
    for special in ["/dev/zero", "/dev/stdin"] {
        for file in ["shard", CONFIG_FILE] {
            let path = dir.path().join(file);
            if path.is_dir() { fs::remove_dir(&path) } else { fs::remove_file(&path) }.expect("removed");
            std::os::unix::fs::symlink(special, &path).expect("linked");
        }
        assert_eq!(message(dir.path()), "cannot read `DIR/config.json`: it is not a regular file");
    }
    for weight_map in [json!([1]), json!({ "a": 1 }), json!("x"), json!(null)] {
        let (dir, _) = gpt2();
        fs::remove_file(dir.path().join(WEIGHTS_FILE)).expect("removed");
        fs::write(dir.path().join(INDEX_FILE), json!({ "weight_map": weight_map }).to_string()).expect("writes");
        assert!(message(dir.path()).starts_with("`DIR/model.safetensors.index.json` is damaged"));
    }
    for shard in ["", ".", "..", "/etc/passwd", "a/b", "../x", "a\u{0}b"] {
        let (dir, _) = gpt2();
        fs::remove_file(dir.path().join(WEIGHTS_FILE)).expect("removed");
        let index = json!({ "weight_map": { "transformer.wte.weight": shard } });
        fs::write(dir.path().join(INDEX_FILE), index.to_string()).expect("writes");
        let message = message(dir.path());
        assert!(message.contains("is not a file name") || message.starts_with("cannot read"), "{message}");
    }
}
