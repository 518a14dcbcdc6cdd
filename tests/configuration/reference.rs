//! docs/configuration.md, rendered from the schemas.

use std::fmt::Write as _;

use common::config::{Key, Kind, Section, toml_text};
use serde_json::Value;

const INTRODUCTION: &str = "\
# Configuration

This file is generated from the program (`UPDATE_SNAPSHOTS=1 cargo test --release -p pipeline-tests --test configuration`).

Every training command reads one TOML file (`--config FILE`); a recipe is a folder with one file for each stage and a
`recipe.toml`. `--set section.key=VALUE` overrides a key from the command line, for example `--set train.steps=20`; in
`recipe run` the name of the stage comes first, for example `--set sft.train.steps=20` or `--set recipe.seed=2`.
`--print-config` prints the configuration that a command would use, with every key and its meaning in comments:

```
sft train --print-config                                            # the defaults
sft train --config configs/tiny/sft.toml --set train.steps=20 --print-config
recipe run configs/tiny --set sft.train.steps=20 --print-config     # all stages, keys named as in --set
```

- Every key may be left out, and then has its default, except those marked *required*. A key without a default may be
  absent; its description says what happens then.
- `train.steps` takes precedence over `train.epochs`.
- An unknown key, a value of the wrong type and a number outside its range are errors that name file, line and key.
- A checkpoint holds the configuration it was trained with, all defaults filled in, as `config.toml`; it can be passed
  back as `--config`.
- In `recipe.toml`, the tables `[world]`, `[gold]`, `[collect]` and `[evaluate]` may be left out; the recipe then does without
  that step. The file of a stage that `stages` does not name is not read. `seed` in `recipe.toml` applies to all stages.
";

/// How the doc comment of a key ends without which the configuration, or its table, is refused.
const REQUIRED: &str = " Required.";

/// The whole page.
pub(crate) fn markdown(files: &[(&str, Vec<Section>)]) -> String {
    let mut page = INTRODUCTION.to_owned();
    for (file, sections) in files {
        let _ = write!(page, "\n## {file}\n");
        for section in sections {
            write_section(section, &mut page);
        }
    }
    page
}

fn write_section(section: &Section, page: &mut String) {
    if !section.path.is_empty() {
        let absent = if section.optional { " May be absent." } else { "" };
        let _ = write!(page, "\n### `[{}]`\n\n{}{absent}\n", section.path, section.doc);
    }
    if section.keys.is_empty() {
        return;
    }
    page.push_str("\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n");
    for key in &section.keys {
        let required = key.required || key.doc.ends_with(REQUIRED);
        let default = match &key.default {
            _ if required => "*required*".to_owned(),
            Some(Value::String(text)) if text.is_empty() => "`\"\"`".to_owned(),
            Some(value) => format!("`{}`", toml_text(value)),
            None => "none".to_owned(),
        };
        let _ = writeln!(page, "| `{}` | {} | {default} | {} |", key.name, kind(key), cell(&meaning(key)));
    }
}

fn kind(key: &Key) -> String {
    match &key.kind {
        Kind::Choice(_) => "string".to_owned(),
        Kind::Bool => "boolean".to_owned(),
        Kind::List(item, None) if matches!(**item, Kind::Text | Kind::Choice(_)) => "list of strings".to_owned(),
        kind => {
            let text = kind.to_string();
            text.strip_prefix("a ").unwrap_or(&text).to_owned()
        }
    }
}

fn meaning(key: &Key) -> String {
    let mut text = key.doc.trim_end_matches(REQUIRED).to_owned();
    if let Kind::Choice(choices) = &key.kind {
        for (name, doc) in choices {
            let _ = write!(text, "<br>`\"{name}\"`: {doc}");
        }
    }
    text
}

/// `text` within a cell of a table.
fn cell(text: &str) -> String {
    text.replace("\n\n", " ").replace('|', "\\|")
}
