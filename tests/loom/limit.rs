//! The limit: it is never exceeded, nobody is refused while there is room, and nobody waits
//! for ever. (A thread that would do so ends the model with an error.)

use std::sync::Arc;

use loom::model::Builder;
use loom::thread;

use nbdkit_cow_filter::block::BlockNum;
use nbdkit_cow_filter::overlay::budget::Share;
use nbdkit_cow_filter::overlay::{Account, BlockMap, Budget, OVERLAY_LEN, State, Zeroing};

use super::{BLOCK, BLOCKS, Disk, ModelBase, disk};

/// There are too many orders: only those in which threads are stopped that could go on no
/// more than three times.
fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// Each puts two bytes in flight and takes one of them.
#[test]
fn three_who_give_half_back_all_have_room_for_it() {
    check(|| {
        let budget = Arc::new(Budget::new(4));
        let account = Account::new(&budget);
        let take_one = |budget: &Budget, account: &Account| {
            let charge = account.charge(2, Share::All).expect("there is room");
            assert!(budget.used() <= 4);
            charge.settle(1);
        };
        let threads = [(); 2].map(|()| {
            let (budget, account) = (Arc::clone(&budget), Arc::clone(&account));
            thread::spawn(move || take_one(&budget, &account))
        });
        take_one(&budget, &account);
        for thread in threads {
            thread.join().expect("no panic");
        }
        assert_eq!(budget.used(), 3);
    });
}

/// One waits for what is in flight, which lands: then it is refused.
#[test]
fn of_two_who_take_the_rest_one_is_refused() {
    check(|| {
        let budget = Arc::new(Budget::new(3));
        let account = Account::new(&budget);
        let thread = {
            let account = Arc::clone(&account);
            thread::spawn(move || account.take(2, Share::All).is_ok())
        };
        let here = account.take(2, Share::All).is_ok();
        let there = thread.join().expect("no panic");
        assert!(here != there);
        assert_eq!(budget.used(), 2);
    });
}

/// A disk with a leaf of the map, and room for one block.
fn disk_for_one() -> (Arc<Disk>, Arc<Budget>) {
    let map = BlockMap::new(BlockNum(BLOCKS));
    map.set_data(&(BlockNum(0)..BlockNum(1))).expect("in range");
    let budget = Arc::new(Budget::new(OVERLAY_LEN + map.usage().memory + BLOCK));
    (disk_within(&budget), budget)
}

fn disk_within(budget: &Arc<Budget>) -> Arc<Disk> {
    Arc::new(disk().limited(Some(Account::new(budget))))
}

fn write(disk: &Disk, block: u64) -> bool {
    let written = disk.write(&ModelBase, &[7; BLOCK as usize], block * BLOCK);
    written
        .inspect_err(|e| assert!(e.is_over_limit(), "{e}"))
        .is_ok()
}

/// What is charged is what is stored, and the map.
fn assert_settled(disk: &Disk, budget: &Budget) {
    disk.give_back();
    let data = (0..2).filter(|block| {
        let state = disk.state_at(block * BLOCK).expect("in range");
        state == State::Data
    });
    let memory = budget.limit() - BLOCK;
    assert_eq!(budget.used(), memory + data.count() as u64 * BLOCK);
}

#[test]
fn of_two_who_write_the_same_block_none_is_refused() {
    check(|| {
        let (disk, budget) = disk_for_one();
        let thread = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || write(&disk, 0))
        };
        assert!(write(&disk, 0));
        assert!(thread.join().expect("no panic"));
        assert_settled(&disk, &budget);
    });
}

#[test]
fn of_two_who_write_the_last_block_one_is_refused() {
    check(|| {
        let (disk, budget) = disk_for_one();
        let thread = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || write(&disk, 1))
        };
        let here = write(&disk, 0);
        let there = thread.join().expect("no panic");
        assert!(here != there);
        assert_settled(&disk, &budget);
    });
}

#[test]
fn a_write_after_a_trim_has_its_room_beside_another_write() {
    check(|| {
        let (disk, budget) = disk_for_one();
        assert!(write(&disk, 0));
        let thread = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || {
                disk.zero(&ModelBase, 0, BLOCK, Zeroing::Trim)
                    .expect("it needs nothing");
            })
        };
        // Refused, if it came before.
        let is_written = write(&disk, 1);
        thread.join().expect("no panic");
        assert!(is_written || write(&disk, 1));
        assert_settled(&disk, &budget);
    });
}

/// There is room for both, but for the blocks of one only. Neither may take a part of that
/// and leave the other without the rest.
#[test]
fn of_two_new_overlays_one_is_written_to() {
    check(|| {
        let (_, for_one) = disk_for_one();
        let budget = Arc::new(Budget::new(OVERLAY_LEN + for_one.limit()));
        let [one, other] = [(); 2].map(|()| disk_within(&budget));
        let thread = {
            let other = Arc::clone(&other);
            thread::spawn(move || write(&other, 1))
        };
        let here = write(&one, 0);
        let there = thread.join().expect("no panic");
        assert!(here != there);
    });
}
