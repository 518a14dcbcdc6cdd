//! `docs/book`: its chapters, its links, and the outputs that it lists, which are those of the commands above them.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pipeline_tests::binary;

/// What each chapter has, besides its text.
const SECTIONS: [&str; 5] = ["The equation", "In the code", "An experiment", "An exercise", "What the literature says"];

/// Pages that are no chapter of the path.
const FRONT: [&str; 2] = ["SUMMARY.md", "introduction.md"];

/// Stands for any text in a line, and as a line by itself for any lines.
const ANYTHING: char = '…';

/// Figures of equations; the others are of a training run.
const OF_EQUATIONS: [&str; 3] = ["clip.svg", "pairwise-loss.svg", "sinusoids.svg"];

/// How far a curve may be from the committed one, in the plot's units, of which a pixel has four.
const FIGURE_TOLERANCE: f64 = 2.0;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn source() -> PathBuf {
    root().join("docs/book/src")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("`{}`: {error}", path.display()))
}

/// A page without its blocks of code.
fn prose(text: &str) -> String {
    text.split("\n```").step_by(2).collect::<Vec<_>>().join("\n")
}

/// `(text, target)` of every link and figure.
fn links(text: &str) -> Vec<(String, String)> {
    let prose = prose(text);
    let mut links = Vec::new();
    for (end, _) in prose.match_indices("](") {
        let start = prose[..end].rfind('[').unwrap();
        let target = prose[end + 2..].split(')').next().unwrap();
        links.push((prose[start + 1..end].to_owned(), target.to_owned()));
    }
    links
}

/// The names under which the headings of a page can be linked to.
fn anchors(text: &str) -> Vec<String> {
    let headings = prose(text).lines().filter_map(|line| Some(line.strip_prefix('#')?.to_owned())).collect::<Vec<_>>();
    let slug = |heading: &String| {
        let words = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        words.chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect()
    };
    headings.iter().map(slug).collect()
}

/// The pages in the order of `SUMMARY.md`, with their names.
fn pages() -> Vec<(String, String)> {
    let summary = read(&source().join("SUMMARY.md"));
    links(&summary).into_iter().map(|(_, name)| (name.clone(), read(&source().join(name)))).collect()
}

#[test]
fn every_page_is_in_the_summary_once_and_chapters_have_the_same_sections() {
    let pages = pages();
    let listed: BTreeSet<String> = pages.iter().map(|(name, _)| name.clone()).collect();
    assert_eq!(listed.len(), pages.len(), "SUMMARY.md names a page twice");
    let files = std::fs::read_dir(source()).unwrap().map(|entry| entry.unwrap().path());
    let pages_there = files.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    let names = pages_there.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned());
    let there: BTreeSet<String> = names.filter(|name| name != "SUMMARY.md").collect();
    assert_eq!(listed, there);
    for (name, text) in pages.iter().filter(|(name, _)| !FRONT.contains(&name.as_str())) {
        let sections: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("## ")).collect();
        for section in SECTIONS {
            assert!(sections.contains(&section), "{name} has no section `{section}`, only {sections:?}");
        }
    }
}

#[test]
fn links_lead_to_files_headings_and_items_that_exist() {
    let mut n_items = 0;
    for (name, text) in pages() {
        for (label, target) in links(&text) {
            if let Some(number) = target.strip_prefix("https://arxiv.org/abs/") {
                assert_eq!(label, format!("arXiv:{number}"), "{name}: the number of a paper and its link differ");
                continue;
            }
            assert!(!target.contains("://"), "{name} links to {target}; papers are cited by arXiv number or by name");
            let (file, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let path = if file.is_empty() { source().join(&name) } else { source().join(file) };
            assert!(path.exists(), "{name} links to {target}, which does not exist");
            let is_page = path.extension().is_some_and(|extension| extension == "md");
            assert!(
                !is_page || !file.contains('/'),
                "{name}: mdBook makes {target} a link to a page that it does not write"
            );
            if !anchor.is_empty() {
                assert!(anchors(&read(&path)).contains(&anchor.to_owned()), "{name}: no heading {target}");
            }
            if path.extension().is_some_and(|extension| extension == "rs") {
                n_items += 1;
                let item = label.trim_matches('`');
                assert!(defines(&read(&path), item), "{name}: `{file}` defines no `{item}`");
            }
        }
        for path in quoted_paths(&text) {
            assert!(root().join(&path).exists(), "{name} names `{path}`, which does not exist");
        }
        let papers = prose(&text).match_indices("arXiv:").count();
        let linked = links(&text).iter().filter(|(label, _)| label.starts_with("arXiv:")).count();
        assert_eq!(papers, linked, "{name}: every arXiv number is a link");
    }
    assert!(n_items > 50, "only {n_items} items of the source are named");
}

/// The files of the project that a page names outside of its links.
fn quoted_paths(text: &str) -> Vec<String> {
    let folders =
        ["chat/", "common/", "configs/", "docs/", "dpo/", "ppo/", "pretrain/", "recipe/", "reward-model/", "sft/"];
    let prose = prose(text);
    let quoted = prose.split('`').skip(1).step_by(2);
    let paths = quoted.filter(|name| folders.iter().any(|folder| name.starts_with(folder)) && name.contains('.'));
    paths.filter(|path| !path.contains([' ', '\n'])).map(str::to_owned).collect()
}

/// Whether a source file has a function, type or constant of this name.
fn defines(source: &str, item: &str) -> bool {
    let kinds = ["fn", "struct", "enum", "trait", "type", "const"];
    source.lines().filter(|line| !line.trim_start().starts_with("//")).any(|line| {
        kinds.iter().any(|kind| {
            line.split_once(&format!("{kind} {item}")).is_some_and(|(before, after)| {
                let is_word = |c: char| c.is_alphanumeric() || c == '_';
                !before.ends_with(is_word) && !after.starts_with(is_word)
            })
        })
    })
}

#[test]
fn an_item_is_found_by_its_whole_name() {
    assert!(defines("pub fn gae(rewards: &[f32])", "gae"));
    assert!(defines("    const fn of<T>(n: usize) -> Self {", "of"));
    assert!(!defines("pub fn gae_of(rewards: &[f32])", "gae"));
    assert!(!defines("// fn gae is elsewhere", "gae") && !defines("let gae = 1;", "gae"));
}

/// A command of the book and what it is said to print.
struct Listing {
    page: String,
    command: String,
    output: Vec<String>,
    agreement: Agreement,
}

/// What a machine with other weights prints, as the line under a listing says.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Agreement {
    /// The same.
    Exact,
    /// The same text, with numbers within this part of the listed ones.
    Near(f64),
    /// Something else.
    Differs,
}

impl Agreement {
    fn of(line: &str) -> Option<Self> {
        match line {
            "*The same on every machine.*" => Some(Self::Exact),
            "*Differs between machines.*" => Some(Self::Differs),
            _ => {
                let percent = line.strip_prefix("*Numbers within ")?.strip_suffix(" % on other machines.*")?;
                percent.parse().ok().map(|percent: f64| Self::Near(percent / 100.0))
            }
        }
    }
}

/// The listings of a page, in order.
fn listings(page: &str, text: &str) -> Vec<Listing> {
    let mut listings: Vec<Listing> = Vec::new();
    let mut parts = text.split("\n```console\n");
    parts.next();
    for part in parts {
        let (block, rest) = part.split_once("\n```\n").unwrap_or_else(|| panic!("{page}: a block without an end"));
        let caption = rest.lines().find(|line| !line.is_empty()).unwrap_or_default();
        let agreement = Agreement::of(caption)
            .unwrap_or_else(|| panic!("{page}: under a listing stands `{caption}`, not how far it holds elsewhere"));
        for line in block.lines() {
            let open = listings.last_mut().filter(|listing| listing.page == page);
            match (line.strip_prefix("$ "), open) {
                (Some(command), _) => {
                    let (page, command) = (page.to_owned(), command.to_owned());
                    listings.push(Listing { page, command, output: Vec::new(), agreement });
                }
                (None, Some(open)) if open.command.ends_with('\\') => {
                    open.command.pop();
                    open.command += line.trim();
                }
                (None, Some(open)) => open.output.push(line.to_owned()),
                (None, None) => panic!("{page}: output without a command: {line}"),
            }
        }
    }
    listings
}

/// A part of a line: text, a number, or anything at all.
#[derive(Clone, Debug, PartialEq)]
enum Part {
    Text(char),
    Number { value: f64, last_digit: f64 },
    Anything,
}

/// Takes a line apart; runs of spaces count as one, because columns move with the width of numbers.
fn parts(line: &str) -> Vec<Part> {
    let chars: Vec<char> = line.split_whitespace().collect::<Vec<_>>().join(" ").chars().collect();
    let (mut parts, mut i) = (Vec::new(), 0);
    let is_digit = |i: usize| chars.get(i).is_some_and(char::is_ascii_digit);
    while i < chars.len() {
        let in_word = i > 0 && (chars[i - 1].is_alphanumeric() || chars[i - 1] == '_');
        let has_sign = chars[i] == '-' && is_digit(i + 1);
        if in_word || !(is_digit(i) || has_sign) {
            parts.push(if chars[i] == ANYTHING { Part::Anything } else { Part::Text(chars[i]) });
            i += 1;
            continue;
        }
        let start = i;
        i += 1;
        while is_digit(i) || chars.get(i) == Some(&'.') && is_digit(i + 1) {
            i += 1;
        }
        let digits: String = chars[start..i].iter().collect();
        let decimals = digits.split_once('.').map_or(0, |(_, decimals)| decimals.len());
        let mut scale = 1.0;
        if chars.get(i) == Some(&'e') && (is_digit(i + 1) || chars.get(i + 1) == Some(&'-') && is_digit(i + 2)) {
            let exponent: String = chars[i + 1..].iter().take_while(|c| c.is_ascii_digit() || **c == '-').collect();
            i += 1 + exponent.len();
            scale = 10f64.powi(exponent.parse().unwrap());
        }
        let value = digits.parse::<f64>().unwrap_or(f64::NAN) * scale;
        parts.push(Part::Number { value, last_digit: scale / 10f64.powi(decimals as i32) });
    }
    parts
}

/// Whether `actual` is a line as `expected` says it, numbers within `tolerance` and one in the last digit.
fn line_fits(expected: &[Part], actual: &[Part], tolerance: f64) -> bool {
    match (expected, actual) {
        ([], []) => true,
        ([Part::Anything, rest @ ..], _) => (0..=actual.len()).any(|i| line_fits(rest, &actual[i..], tolerance)),
        ([Part::Text(a), expected @ ..], [Part::Text(b), actual @ ..]) => {
            a == b && line_fits(expected, actual, tolerance)
        }
        ([Part::Number { value: a, last_digit }, expected @ ..], [Part::Number { value: b, .. }, actual @ ..]) => {
            let allowed = if tolerance > 0.0 { tolerance * a.abs().max(b.abs()) + 1.01 * last_digit } else { 0.0 };
            (a - b).abs() <= allowed && line_fits(expected, actual, tolerance)
        }
        _ => false,
    }
}

/// Whether the lines fit, a line of [`ANYTHING`] standing for any number of them.
fn output_fits(expected: &[String], actual: &[&str], tolerance: f64) -> bool {
    let actual: Vec<Vec<Part>> = actual.iter().map(|line| parts(line)).collect();
    // How many lines of `actual` the lines so far may stand for.
    let mut ends = BTreeSet::from([0]);
    for line in expected {
        let line = parts(line);
        ends = match ends.first() {
            Some(&first) if line == [Part::Anything] => (first..=actual.len()).collect(),
            _ => {
                let fits = |&end: &usize| end < actual.len() && line_fits(&line, &actual[end], tolerance);
                ends.into_iter().filter(fits).map(|end| end + 1).collect()
            }
        };
    }
    ends.contains(&actual.len())
}

#[test]
fn listed_outputs_are_compared_number_by_number() {
    let fits = |expected: &str, actual: &str, tolerance| {
        let expected: Vec<String> = expected.lines().map(str::to_owned).collect();
        output_fits(&expected, &actual.lines().collect::<Vec<_>>(), tolerance)
    };
    assert!(fits("loss 1.00  ok", "loss   1.05 ok", 0.05) && !fits("loss 1.00", "loss 1.08", 0.05));
    assert!(fits("loss …, 3 steps", "loss 0.7945, 3 steps", 0.0) && !fits("a 3", "b 3", 0.5));
    assert!(!fits("kl -1.5", "kl 1.5", 0.1) && fits("kl 0.01", "kl 0.02", 0.01) && fits("x 2e-3", "x 2.1e-3", 0.1));
    assert!(!fits("layer1 3", "layer2 3", 0.9) && !fits("1.000", "1.001", 0.0));
    assert_eq!(after_time("2026-11-28 14:43:52 step 1"), "step 1");
    assert!(fits("a\n…\nb", "a\n1\n2\nb", 0.0) && !fits("a\n…\nb", "a\n1\n2", 0.0) && !fits("a", "a\nb", 0.0));
}

/// Where the commands of the book run: an empty project with the book's recipe.
struct Project {
    dir: tempfile::TempDir,
}

impl Project {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let recipe = dir.path().join("docs/book/recipe");
        std::fs::create_dir_all(&recipe).unwrap();
        for entry in std::fs::read_dir(root().join("docs/book/recipe")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), recipe.join(entry.file_name())).unwrap();
        }
        Self { dir }
    }

    /// Runs a line of shell and returns what a terminal would show.
    fn run(&self, command: &str) -> String {
        let programs = binary("book").parent().unwrap().to_owned();
        let path = std::env::join_paths(
            std::iter::once(programs).chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
        );
        let output = Command::new("sh")
            .args(["-c", &format!("exec 2>&1\n{command}")])
            .current_dir(self.dir.path())
            .env("PATH", path.unwrap())
            .env("KINDLING_CACHE", self.dir.path().join("cache"))
            .env("COLUMNS", "100")
            // Without it, a search for GPUs prints complaints of the Wayland library.
            .env("XDG_RUNTIME_DIR", self.dir.path())
            .env_remove("RUST_LOG")
            .env_remove("KINDLING_DATA")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        // Messages have the time in front where they do not go to a terminal.
        let printed = String::from_utf8(output.stdout).unwrap();
        let text: String = printed.lines().map(|line| format!("{}\n", after_time(line))).collect();
        assert!(output.status.success(), "`{command}` failed:\n{text}");
        text
    }
}

/// A message without the time in front: `2026-11-28 14:43:52 `.
fn after_time(line: &str) -> &str {
    let is_time = |stamp: &str| {
        let shape = stamp.replace(|c: char| c.is_ascii_digit(), "0");
        shape == "0000-00-00 00:00:00 "
    };
    line.split_at_checked(20).filter(|(stamp, _)| is_time(stamp)).map_or(line, |(_, message)| message)
}

/// On a machine that trains the weights of which the introduction prints the hash, everything is as listed. On others,
/// sums are rounded differently, and the line under each listing says how far it holds.
#[test]
fn the_commands_print_what_is_listed() {
    for program in ["recipe", "pretrain", "sft", "reward-model", "ppo", "dpo", "chat"] {
        binary(program);
    }
    let project = Project::new();
    let listings: Vec<Listing> = pages().iter().flat_map(|(name, text)| listings(name, text)).collect();
    assert!(listings.len() > 30, "only {} listings were found", listings.len());
    let (mut same_weights, mut faults) = (None, Vec::new());
    for Listing { page, command, output, agreement } in &listings {
        let printed = project.run(command);
        let lines: Vec<&str> = printed.lines().collect();
        let is_listed = output_fits(output, &lines, 0.0);
        if command.contains("weights_sha256") {
            same_weights = Some(is_listed);
            println!("the weights of this machine are those of the book: {is_listed}");
        }
        let fits = match agreement {
            _ if is_listed => true,
            Agreement::Near(tolerance) if same_weights != Some(true) => output_fits(output, &lines, *tolerance),
            Agreement::Differs => same_weights != Some(true),
            _ => false,
        };
        if !fits {
            faults.push(format!(
                "{page} ({agreement:?}): {command}\nlisted:\n{}\nprinted:\n{printed}",
                output.join("\n")
            ));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n\n"));
    let same_weights = same_weights.expect("a listing prints the hash of the weights");
    check_figures(&project.dir.path().join("runs/book/figures"), same_weights);
}

/// The committed figures are those that the book's command drew, as far as they do not depend on the weights.
fn check_figures(drawn: &Path, same_weights: bool) {
    let committed = source().join("figures");
    let names = |dir: &Path| -> BTreeSet<String> {
        let entries = std::fs::read_dir(dir).unwrap_or_else(|error| panic!("`{}`: {error}", dir.display()));
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert_eq!(names(&committed), names(drawn));
    for name in names(drawn).into_iter().filter(|name| same_weights || OF_EQUATIONS.contains(&name.as_str())) {
        let [a, b] = [committed.as_path(), drawn].map(|dir| curves(&read(&dir.join(&name))));
        assert_eq!(a.len(), b.len(), "{name} has as many numbers in its curves");
        let furthest = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(furthest <= FIGURE_TOLERANCE, "{name} is off by {furthest}");
    }
}

/// The coordinates of the curves in a plot.
fn curves(svg: &str) -> Vec<f64> {
    let lines = svg.split("points=\"").skip(1).filter_map(|rest| rest.split('"').next());
    lines.flat_map(|points| points.split([',', ' '])).filter_map(|number| number.parse().ok()).collect()
}
