//! Connections that go away in the middle of everything.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::time::Instant;

use super::client::{Client, Halt, PATIENCE, Request, Result, Torn, What};
use super::mix::Kind;

impl Client<'_> {
    /// Tears one connection, in the middle of a request.
    pub fn tear(&mut self) -> Result {
        let at = self.random.below(self.connections.len() as u64) as usize;
        let mut connection = self.connections.swap_remove(at);
        let torn = connection.number;
        let is_of_it = |request: &Request| request.connection == torn;
        let in_flight = self.in_flight.values().filter(|r| is_of_it(r)).count();
        let (cut, how) = self.how_to_tear(in_flight);
        let message = self.any_write();
        let cut = cut as usize % message.len();
        if let Err(error) = connection.send_raw(&message[..cut]) {
            return Err(self.halt(format!("sending a part of a request: {error}")));
        }
        connection.tear(how);
        self.tally.happened("torn connections", 1);
        let cookies: Vec<u64> = self
            .in_flight
            .iter()
            .filter(|(_, r)| is_of_it(r))
            .map(|(cookie, _)| *cookie)
            .collect();
        let mut requests = BTreeMap::new();
        let mut again = Vec::new();
        for cookie in cookies {
            let request = self.in_flight.remove(&cookie).expect("it is in flight");
            self.remember(cookie, &request, "torn");
            self.given_up.insert(cookie);
            match request.what {
                What::Change(_) => {
                    requests.insert(cookie, request);
                }
                What::Settle(expectation, numbers, unit) => {
                    again.push((expectation, numbers, unit))
                }
                _ => {}
            }
        }
        self.tally.happened("torn changes", requests.len() as u64);
        if self.mix.kind == Kind::PerConnection {
            // What was written over it is gone with it.
            requests.clear();
            again.clear();
            self.met.clear();
        }
        self.torn.push(Torn {
            connection,
            since: Instant::now(),
            requests,
        });
        self.connect()?;
        for (expectation, numbers, unit) in again {
            self.settle_again(expectation, numbers, unit)?;
        }
        Ok(())
    }

    /// After how many bytes of a request, and whether replies are still taken.
    pub fn how_to_tear(&mut self, in_flight: usize) -> (u64, Shutdown) {
        let cut = match self.random.below(4) {
            0 => 0,
            1 => self.random.below(28),
            _ => self.random.below(self.mix.longest),
        };
        let how = self.random.of(&[Shutdown::Both, Shutdown::Write]);
        match self.target.may_fail_to_reply || in_flight == 0 {
            true => (cut, how),
            false => (0, Shutdown::Write),
        }
    }

    /// Finds out what became of the requests of torn connections that are over.
    pub fn look_at_torn(&mut self) -> Result {
        let mut at = 0;
        while at < self.torn.len() {
            if self.target.is_killed() {
                return Err(Halt::Killed);
            }
            if !self.torn[at].connection.is_over(self.target) {
                if self.torn[at].since.elapsed() > PATIENCE {
                    return Err("the server does not end a torn connection"
                        .to_string()
                        .into());
                }
                at += 1;
                continue;
            }
            let torn = self.torn.swap_remove(at);
            self.tick();
            for (cookie, request) in torn.requests {
                let What::Change(change) = request.what else {
                    continue;
                };
                self.over(cookie, change, self.mix.old_or_new())?;
            }
        }
        Ok(())
    }
}
