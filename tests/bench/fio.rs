//! fio with its NBD engine: the load of the throughput rows.

use std::time::Duration;

use serde_json::Value;

use super::command::{self, command};

/// One run of fio. What it writes is random bytes, so no block is all zeroes.
#[derive(Clone, Copy)]
pub struct Job {
    /// As fio calls it: `randread`, `write`, `randrw`...
    pub pattern: &'static str,
    /// Bytes in a request.
    pub block: u64,
    /// Requests in flight on each connection.
    pub depth: u32,
    pub connections: u32,
    /// Bytes of the disk, from its start, that are used. No block is written
    /// twice: a job that writes ends when it has been everywhere.
    pub size: u64,
    pub time: Duration,
    /// A flush after so many writes; 0: none.
    pub flush_every: u32,
}

impl Job {
    pub fn reads_only(&self) -> bool {
        self.pattern.ends_with("read")
    }

    pub fn is_random(&self) -> bool {
        self.pattern.starts_with("rand")
    }

    /// Gives requests per second.
    pub fn run(&self, uri: &str) -> Result<f64, String> {
        let share = self.size / u64::from(self.connections);
        let mut fio = command("fio");
        fio.args(["--name=bench", "--ioengine=nbd", "--thread"])
            .args(["--group_reporting", "--output-format=json", "--eta=never"])
            // Without calibrating a clock of its own, which takes as long as a round.
            .arg("--clocksource=clock_gettime")
            .arg(format!("--uri={uri}"))
            .arg(format!("--rw={}", self.pattern))
            .arg("--rwmixread=70")
            .arg(format!("--bs={}", self.block))
            .arg(format!("--iodepth={}", self.depth))
            .arg(format!("--numjobs={}", self.connections))
            .arg(format!("--size={share}"))
            .arg(format!("--offset_increment={share}"))
            .arg(format!("--runtime={}ms", self.time.as_millis()));
        if self.flush_every > 0 {
            fio.arg(format!("--fsync={}", self.flush_every));
        }
        if self.reads_only() {
            fio.arg("--time_based");
        }
        let (output, _) = command::run(&mut fio, Duration::from_secs(20))?;
        requests_per_second(&output).ok_or_else(|| "fio's report can't be read".into())
    }
}

fn requests_per_second(output: &str) -> Option<f64> {
    // fio's NBD engine says a word of its own first.
    let report = &output[output.find('{')?..];
    let report: Value = serde_json::from_str(report).ok()?;
    let job = report.get("jobs")?.get(0)?;
    let (mut requests, mut time) = (0.0, 0.0f64);
    for direction in ["read", "write"] {
        let part = job.get(direction)?;
        requests += part.get("total_ios")?.as_f64()?;
        time = time.max(part.get("runtime")?.as_f64()?);
    }
    // Milliseconds.
    (requests > 0.0 && time > 0.0).then(|| requests * 1000.0 / time)
}
