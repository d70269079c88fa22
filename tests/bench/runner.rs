//! Rounds, and the statistics over them.
//!
//! A round asks each system of each cell once, the systems of a cell directly
//! one after the other, so that both sides of a ratio were measured within a
//! second or two. Which comes first moves on by one each round, and every second
//! round goes the other way round, so that nobody always comes after the same one.
//! Where a competitor takes seconds, noise is no matter, and once will do.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::systems::System;

/// A competitor whose figure takes longer is not asked for another.
const LONG: Duration = Duration::from_millis(1500);

/// In every so many rounds of processor time all systems are asked.
const BESIDE: usize = 4;

/// Why it has a figure from one round only.
pub const ONCE: &str = "measured in the first round only, because it takes so long";

/// How much is measured.
pub struct Effort {
    pub quick: bool,
    pub rounds: usize,
    /// Rounds of the processor time, which are short.
    pub turns: usize,
    /// Of one run of fio.
    pub time: Duration,
    /// The same for the rates that have something to reach.
    pub more_rounds: usize,
    pub more_time: Duration,
    /// Bytes of the disk that the throughput rows use.
    pub disk: u64,
}

impl Effort {
    pub const FULL: Effort = Effort {
        quick: false,
        rounds: 3,
        turns: 40,
        time: Duration::from_millis(80),
        more_rounds: 5,
        more_time: Duration::from_millis(250),
        disk: 1 << 30,
    };
    pub const QUICK: Effort = Effort {
        quick: true,
        rounds: 1,
        turns: 5,
        time: Duration::from_millis(60),
        more_rounds: 2,
        more_time: Duration::from_millis(100),
        disk: 256 << 20,
    };
}

/// How a row's numbers are to be read.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// Requests per second; the others as a ratio to "no filter".
    Rate,
    /// Requests per second, as a fraction of this many.
    OfLimit(f64),
    /// Seconds of processor time for a request; the others as a ratio to "no filter".
    Processor,
    /// Seconds; the others as a ratio to "no filter".
    Time,
    /// A number with a unit, shown as it is.
    Amount(&'static str),
}

/// Why a system has no figure.
#[derive(Clone)]
pub enum Failure {
    /// It may do better in the next round.
    ThisTime(String),
    /// It is not asked again.
    Always(String),
    /// It is not asked again either, and is not expected to have a figure: a note.
    NotAsked(String),
}

impl From<String> for Failure {
    fn from(reason: String) -> Failure {
        Failure::ThisTime(reason)
    }
}

impl From<&str> for Failure {
    fn from(reason: &str) -> Failure {
        Failure::ThisTime(reason.into())
    }
}

pub type Measured = Result<f64, Failure>;

/// A row that is still to be measured.
pub struct Cell<'a> {
    pub id: String,
    pub title: String,
    pub kind: Kind,
    pub rounds: usize,
    pub systems: Vec<System>,
    pub measure: Box<dyn FnMut(System) -> Measured + 'a>,
}

/// A row as it was measured: for each system one figure a round, if it could be had.
pub struct Row {
    pub id: String,
    pub title: String,
    pub kind: Kind,
    /// The system that the row is about: the first of its systems.
    pub subject: System,
    pub figures: BTreeMap<System, Vec<Option<f64>>>,
    /// Why figures are missing that should be there.
    pub failures: BTreeMap<System, BTreeSet<String>>,
    /// What else is to be known about figures.
    pub notes: BTreeMap<System, BTreeSet<String>>,
}

/// A median between the smallest and the largest.
#[derive(Clone, Copy)]
pub struct Spread {
    pub least: f64,
    pub median: f64,
    pub most: f64,
}

impl Spread {
    pub fn of(mut numbers: Vec<f64>) -> Option<Spread> {
        numbers.sort_by(f64::total_cmp);
        let middle = numbers.len() / 2;
        let median = if numbers.len() % 2 == 1 {
            *numbers.get(middle)?
        } else {
            (numbers.get(middle.checked_sub(1)?)? + numbers.get(middle)?) / 2.0
        };
        Some(Spread {
            least: *numbers.first()?,
            median,
            most: *numbers.last()?,
        })
    }
}

impl Row {
    /// A row of figures that were had at once and without rounds.
    pub fn single(id: &str, title: &str, unit: &'static str, figures: &[(System, f64)]) -> Row {
        let figures = figures.iter().map(|&(s, figure)| (s, vec![Some(figure)]));
        Row {
            id: id.into(),
            title: title.into(),
            kind: Kind::Amount(unit),
            subject: System::Ours,
            figures: figures.collect(),
            failures: BTreeMap::new(),
            notes: BTreeMap::new(),
        }
    }

    pub fn note(&mut self, system: System, text: &str) {
        self.notes.entry(system).or_default().insert(text.into());
    }

    /// Whether the row is about the overlay that is kept.
    pub fn is_kept(&self) -> bool {
        self.subject == System::Kept
    }

    /// The system's own figures.
    pub fn own(&self, system: System) -> Option<Spread> {
        Spread::of(
            self.figures
                .get(&system)?
                .iter()
                .flatten()
                .copied()
                .collect(),
        )
    }

    /// What `f` makes of two systems' figures in the rounds in which both had one.
    pub fn both(&self, one: System, other: System, f: fn(f64, f64) -> f64) -> Option<Spread> {
        let pairs = self
            .figures
            .get(&one)?
            .iter()
            .zip(self.figures.get(&other)?);
        Spread::of(pairs.filter_map(|(a, b)| Some(f((*a)?, (*b)?))).collect())
    }

    pub fn ratio(&self, one: System, other: System) -> Option<Spread> {
        self.both(one, other, |a, b| a / b)
    }

    /// What the table shows for a system: see [`Kind`].
    pub fn shown(&self, system: System) -> Option<Spread> {
        match self.kind {
            Kind::Rate | Kind::Processor | Kind::Time => self.ratio(system, System::NoFilter),
            Kind::OfLimit(limit) => self.own(system).map(|own| Spread {
                least: own.least / limit,
                median: own.median / limit,
                most: own.most / limit,
            }),
            Kind::Amount(_) => self.own(system),
        }
    }
}

/// A number with as many digits as mean something.
pub fn short(number: f64) -> String {
    match number.abs() {
        0.0 => "0".into(),
        size if size >= 100.0 => format!("{number:.0}"),
        size if size >= 10.0 => format!("{number:.1}"),
        size if size >= 0.095 => format!("{number:.2}"),
        _ => format!("{number:.3}"),
    }
}

/// Measures a cell.
pub fn run_one(cell: Cell<'_>) -> Row {
    run(vec![cell]).pop().expect("the row of a cell")
}

/// Measures all the cells.
pub fn run(mut cells: Vec<Cell<'_>>) -> Vec<Row> {
    let mut rows: Vec<Row> = cells.iter().map(Row::empty).collect();
    let rounds = cells.iter().map(|cell| cell.rounds).max().unwrap_or(0);
    let mut given_up = BTreeSet::new();
    for round in 0..rounds {
        for (index, cell) in cells.iter_mut().enumerate() {
            if round >= cell.rounds {
                continue;
            }
            for system in order(&cell.systems, round) {
                let mut figure = None;
                if rows[index].is_asked(system, round) && !given_up.contains(&(index, system)) {
                    let start = Instant::now();
                    match (cell.measure)(system) {
                        Ok(number) => {
                            figure = Some(number);
                            if rows[index].once_will_do(system) && start.elapsed() > LONG {
                                given_up.insert((index, system));
                                rows[index].note(system, ONCE);
                            }
                        }
                        Err(Failure::ThisTime(reason)) => rows[index].failed(system, reason),
                        Err(Failure::Always(reason)) => {
                            given_up.insert((index, system));
                            rows[index].failed(system, reason);
                        }
                        Err(Failure::NotAsked(reason)) => {
                            given_up.insert((index, system));
                            rows[index].note(system, &reason);
                        }
                    }
                }
                let figures = rows[index].figures.entry(system).or_default();
                figures.push(figure);
            }
            // Rounds of milliseconds don't each need a line.
            if cell.kind != Kind::Processor || round + 1 == cell.rounds {
                rows[index].progress(round + 1, cell.rounds);
            }
        }
    }
    rows
}

/// The systems in a round's order.
fn order(systems: &[System], round: usize) -> Vec<System> {
    let count = systems.len();
    let turns = 0..count;
    let step = if round % 2 == 0 { 1 } else { count - 1 };
    turns
        .map(|turn| systems[(round + turn * step) % count])
        .collect()
}

impl Row {
    fn empty(cell: &Cell<'_>) -> Row {
        Row {
            id: cell.id.clone(),
            title: cell.title.clone(),
            kind: cell.kind,
            subject: cell.systems[0],
            figures: cell.systems.iter().map(|s| (*s, Vec::new())).collect(),
            failures: BTreeMap::new(),
            notes: BTreeMap::new(),
        }
    }

    /// Loads take as long as they are given, so there it would say nothing.
    fn once_will_do(&self, system: System) -> bool {
        let load = matches!(self.kind, Kind::Rate | Kind::OfLimit(_) | Kind::Processor);
        !load && self.is_beside(system)
    }

    /// Whether the system is one of those that only show where the others are.
    fn is_beside(&self, system: System) -> bool {
        ![self.subject, System::NoFilter, System::Kept].contains(&system)
    }

    /// Few of the many rounds of processor time are for those.
    fn is_asked(&self, system: System, round: usize) -> bool {
        self.kind != Kind::Processor || !self.is_beside(system) || round % BESIDE == 0
    }

    pub fn failed(&mut self, system: System, reason: String) {
        if self
            .failures
            .entry(system)
            .or_default()
            .insert(reason.clone())
        {
            eprintln!("{}: {}: {reason}", self.title, system.name());
        }
    }

    fn progress(&self, round: usize, rounds: usize) {
        let last = |system| {
            let figure = self
                .figures
                .get(&system)
                .and_then(|figures| *figures.last()?);
            figure.map_or("-".into(), |figure| match self.kind {
                Kind::Processor => format!("{:.2} us", figure * 1e6),
                _ => format!("{figure:.4}"),
            })
        };
        let ours = last(self.subject);
        let none = last(System::NoFilter);
        eprintln!("{round}/{rounds} {}: {ours}, no filter {none}", self.title);
    }
}
