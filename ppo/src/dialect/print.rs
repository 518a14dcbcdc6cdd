//! `ppo dialects`: the table on stdout.

use std::io::Write as _;

use anyhow::Context;
use common::cli::print_json;
use common::config::toml_text;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::Dialect;
use super::table::{self, SOURCES, Switch};
use crate::cli::DialectsArgs;

/// What an estimator sets, whatever the dialect.
const OF_ESTIMATORS: [(&str, &str); 2] = [
    ("rloo", "whiten_rewards = false, whiten_advantages = \"none\""),
    (
        "grpo",
        "as rloo; kl_estimator = \"k3\", kl_place = \"loss\", loss_mean = \"sequence\", whiten_variance = \"sample\"",
    ),
];

/// A switch as it is printed.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its key in `[ppo]`.
    pub name: &'static str,
    /// What it decides.
    pub meaning: &'static str,
    /// Value and source by dialect, in the order of [`Dialect::ALL`].
    pub of: Vec<(Value, &'static str)>,
}

impl<T: Copy + Serialize> Switch<T> {
    fn row(&self) -> Row {
        let of = self.of.iter().map(|&(value, source)| (json!(value), source)).collect();
        Row { name: self.name, meaning: self.meaning, of }
    }
}

/// Every switch, in the order of the configuration.
pub fn rows() -> Vec<Row> {
    vec![
        table::SCORE_POSITION.row(),
        table::MISSING_EOS.row(),
        table::KL_ESTIMATOR.row(),
        table::KL_PLACE.row(),
        table::KL_CLIP.row(),
        table::WHITEN_REWARDS.row(),
        table::WHITEN_ADVANTAGES.row(),
        table::WHITEN_VARIANCE.row(),
        table::LOSS_MEAN.row(),
        table::VALUE_CLIP_RANGE.row(),
        table::VALUE_LOSS_COEF.row(),
        table::REWARD_CLIP.row(),
        table::LOG_RATIO_CLIP.row(),
        table::DUAL_CLIP.row(),
        table::VALUE_INIT.row(),
        table::ADAM_STYLE.row(),
        table::TEMPERATURE_EPS.row(),
        table::PTX_COEF.row(),
        table::POLICY_EMA.row(),
    ]
}

/// Carries out `ppo dialects`.
///
/// # Errors
/// If stdout cannot be written to.
pub(crate) fn run(args: &DialectsArgs) -> anyhow::Result<()> {
    if args.json {
        print_json(&json())
    } else {
        write!(std::io::stdout(), "{}", text()).context("failed to write the list")
    }
}

fn json() -> Value {
    let by_dialect = |row: &Row| -> Map<String, Value> {
        let cells = Dialect::ALL.iter().zip(&row.of);
        cells.map(|(d, (value, source))| (d.name().to_owned(), json!({ "value": value, "source": source }))).collect()
    };
    let sources: Map<String, Value> =
        Dialect::ALL.iter().zip(SOURCES).map(|(dialect, source)| (dialect.name().to_owned(), json!(source))).collect();
    let switches: Vec<Value> = rows()
        .iter()
        .map(|row| json!({ "switch": row.name, "meaning": row.meaning, "dialects": by_dialect(row) }))
        .collect();
    let estimators: Map<String, Value> =
        OF_ESTIMATORS.iter().map(|(name, sets)| ((*name).to_owned(), json!(sets))).collect();
    json!({ "sources": sources, "switches": switches, "estimators": estimators })
}

fn text() -> String {
    let mut lines: Vec<String> = Vec::new();
    for row in rows() {
        lines.push(format!("{}: {}", row.name, row.meaning));
        for (dialect, (value, source)) in Dialect::ALL.iter().zip(&row.of) {
            lines.push(format!("  {:20}  {:14}  {source}", dialect.name(), toml_text(value)));
        }
        lines.push(String::new());
    }
    lines.push("sources".to_owned());
    lines
        .extend(Dialect::ALL.iter().zip(SOURCES).map(|(dialect, source)| format!("  {:20}  {source}", dialect.name())));
    lines.push(String::new());
    lines.push("estimators without a value model set".to_owned());
    lines.extend(OF_ESTIMATORS.iter().map(|(name, sets)| format!("  {name:20}  {sets}")));
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::path::Path;

    use super::*;
    use crate::config::PpoConfig;

    #[test]
    fn the_page_of_dialects_lists_every_switch() {
        let (mut values, mut sources, mut cells) = (String::from("| switch |"), String::new(), String::new());
        for dialect in Dialect::ALL {
            values += &format!(" {} |", dialect.name());
        }
        values += &format!("\n|{}\n", " --- |".repeat(1 + Dialect::ALL.len()));
        for row in rows() {
            let _ = write!(values, "| `{}` |", row.name);
            for (dialect, (value, source)) in Dialect::ALL.iter().zip(&row.of) {
                let value = toml_text(value).replace('"', "");
                let _ = write!(values, " {value} |");
                let _ = writeln!(cells, "| `{}` | {} | {value} | {source} |", row.name, dialect.name());
            }
            values.push('\n');
        }
        for (dialect, source) in Dialect::ALL.iter().zip(SOURCES) {
            let _ = writeln!(sources, "- {}: {source}", dialect.name());
        }
        let estimators = OF_ESTIMATORS.iter().map(|(name, sets)| format!("- `{name}`: {}\n", sets.replace('"', "")));
        let page = include_str!("page.md").replace("{values}\n", &values).replace("{sources}\n", &sources);
        let page = page.replace("{cells}\n", &cells).replace("{estimators}\n", &estimators.collect::<String>());
        common::testing::assert_snapshot(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/dialects.md"), &page);
    }

    #[test]
    fn every_switch_is_a_key_and_every_cell_has_a_source() {
        let config = serde_json::to_value(PpoConfig::default()).expect("a table");
        let rows = rows();
        for row in &rows {
            assert_eq!(config["ppo"][row.name], row.of[0].0, "{}", row.name);
            assert!(row.of.iter().all(|(_, source)| !source.is_empty()), "{}", row.name);
        }
        assert_eq!(rows.len(), 19);
    }
}
