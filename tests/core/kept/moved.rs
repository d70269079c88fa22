//! Images that are not as the filter leaves them, made by hand and at random.

use std::ops::Range;

use super::foreign::{Cluster, Foreign};
use super::random::Random;

/// Clusters of 16K, and three L2 tables; a part of a sector at the end.
const SMALL: (u64, u64) = ((40 << 20) + 1000, 512);
/// Clusters of 128K.
const LARGE: (u64, u64) = ((64 << 20) + 5000, 4096);
/// There is no refcount for a cluster beyond the end, and eight L2 tables.
const FULL: (u64, u64) = (8180 * (16 << 10), 512);
/// There are refcounts for two clusters beyond the end.
const NEARLY_FULL: (u64, u64) = (8178 * (16 << 10), 512);

const ALL: u64 = 0xffff_ffff;

fn new(disk: (u64, u64)) -> Foreign {
    Foreign::new(disk.0, disk.1)
}

fn put(image: &mut Foreign, guest: u64, host: u64, bitmap: u64) {
    let host = Some(host);
    image.clusters.insert(guest, Cluster { bitmap, host });
}

/// Each of the clusters has the home of the one before.
fn chain(image: &mut Foreign, guests: Range<u64>) {
    for guest in guests {
        let host = image.home(guest - 1);
        put(image, guest, host, ALL);
    }
}

/// As a chain, and the first has the home of the last.
fn cycle(image: &mut Foreign, guests: Range<u64>) {
    let host = image.home(guests.end - 1);
    put(image, guests.start, host, 0x5555_5555_aaaa_aaaa);
    chain(image, guests.start + 1..guests.end);
}

fn permute(image: &mut Foreign, guests: &[u64], random: &mut Random) {
    let mut homes: Vec<u64> = guests.iter().map(|guest| image.home(*guest)).collect();
    for i in (1..homes.len()).rev() {
        homes.swap(i, random.below(i as u64 + 1) as usize);
    }
    for (guest, host) in guests.iter().zip(homes) {
        put(image, *guest, host, bitmap(random));
    }
}

/// No block is both *data* and *zero*.
fn bitmap(random: &mut Random) -> u64 {
    let sparse = random.next() & random.next() & random.next() & ALL;
    let data = random.among(&[ALL, ALL, 1, sparse, sparse, 0xff00]);
    let (some, others) = (random.next(), random.next());
    let zero = random.among(&[0, 0, some, some & others]);
    data | (((zero & !data) & ALL) << 32)
}

/// Refcounts of another width, in blocks that are where QEMU puts them.
fn amend(image: &mut Foreign, refcount_order: u32) {
    image.refcount_order = refcount_order;
    image.refcount_blocks.clear();
    image.refcount_table = image.end() + 40;
    image.refcount_table = image.free();
    image.cover();
}

pub fn by_hand() -> Vec<(&'static str, Foreign)> {
    let mut images = Vec::new();
    let mut add = |name, disk: (u64, u64), make: &dyn Fn(&mut Foreign)| {
        let mut image = new(disk);
        make(&mut image);
        image.cover();
        images.push((name, image));
    };
    add("one beyond the end", SMALL, &|image| {
        put(image, 3, image.end() + 1, ALL);
    });
    add("what a guest writes in order", SMALL, &|image| {
        image.write(0, 1);
        for guest in 5..12 {
            image.write(guest, u32::MAX);
        }
        image.write(0, 0xff00);
        image.write(1030, 0xff);
        image.zero(7, true);
        image.zero(8, false);
        image.write(2, 7);
    });
    add("a long chain", SMALL, &|image| {
        for guest in 1..36 {
            put(image, guest, image.home(guest - 1), 1 << (guest % 32));
        }
    });
    add("cycles of two, of three, and a long one", SMALL, &|image| {
        cycle(image, 0..2);
        cycle(image, 10..13);
        for guest in 20..42 {
            let host = image.home(if guest == 20 { 41 } else { guest - 1 });
            put(image, guest, host, 3);
        }
    });
    add("large clusters", LARGE, &|image| {
        cycle(image, 0..3);
        put(image, 4, image.end(), 0xf0);
    });
    add(
        "the disk ends in a block, and the file too",
        LARGE,
        &|image| {
            put(image, image.guest_clusters() - 1, image.end(), 3);
        },
    );
    add("every home is another's", SMALL, &|image| {
        let guests: Vec<u64> = (0..12).chain(1020..1028).collect();
        permute(image, &guests, &mut Random::new(1));
        for number in [image.home(30), image.home(31)] {
            image.garbage.insert(number);
        }
    });
    add("zeroes that have a cluster elsewhere", SMALL, &|image| {
        put(image, 1, image.home(2), ALL << 32);
        put(image, 2, image.home(1), ALL);
        put(image, 3, image.home(3), 0xff << 32);
        put(image, 4, image.end(), 0);
        put(image, 5, image.home(4), 0xff);
    });
    add(
        "zeroes that have a cluster, and all is at home",
        SMALL,
        &|image| {
            put(image, 3, image.home(3), 0xff << 32);
            put(image, 4, image.end(), 0);
            put(image, 5, image.home(4), ALL << 32);
            put(image, 6, image.home(6), ALL);
        },
    );
    add("no room for a scratch cluster", FULL, &|image| {
        cycle(image, 0..3);
        cycle(image, 8170..8173);
    });
    add("room for two scratch clusters", NEARLY_FULL, &|image| {
        cycle(image, 0..3);
        cycle(image, 10..12);
        cycle(image, 8100..8103);
        chain(image, 21..40);
    });
    add(
        "L2 tables moved, and data in their place",
        SMALL,
        &|image| {
            let (first, last) = (image.l2[&0], image.l2[&2]);
            image.l2.insert(0, image.home(1));
            image.l2.insert(2, image.end() + 2);
            put(image, 1, first, ALL);
            put(image, 2, last, 0xff);
            put(image, 2100, image.home(2), 1);
        },
    );
    add("L1 and refcounts moved and grown", SMALL, &|image| {
        image.l1 = image.home(0);
        image.l1_size += 9;
        put(image, 0, image.refcount_table, ALL);
        image.refcount_table = image.end();
        image.refcount_table_clusters = 3;
        let block = image.refcount_blocks[&0];
        image.refcount_blocks.insert(0, image.home(9));
        put(image, 9, block, 0xffff);
    });
    add("more refcount blocks than needed", SMALL, &|image| {
        put(image, 9, 3 * 8192 + 9, ALL);
        image.leaks.insert(2 * 8192 + 5);
    });
    for order in [0, 1, 2, 3, 5, 6] {
        add("another width of refcounts", SMALL, &|image| {
            put(image, 1030, image.home(1030), ALL);
            put(image, 6, image.home(6), 1);
            amend(image, order);
            if order % 2 == 0 {
                cycle(image, 20..22);
                image.write(7, 3);
            }
        });
    }
    add("a dirty one", SMALL, &|image| {
        cycle(image, 0..2);
        put(image, 5, image.home(5), ALL);
        put(image, 6, image.home(7), ALL);
        image.is_dirty = true;
        image.has_lazy_refcounts = true;
        let wrong = [(5, 0), (9, 1), (7, 2), (0, 0), (11, 2), (1, 3), (6, 2)];
        for (guest, count) in wrong {
            image.miscounted.insert(image.home(guest), count);
        }
    });
    add("a dirty one in which all is at home", SMALL, &|image| {
        put(image, 5, image.home(5), ALL);
        image.is_dirty = true;
        image.miscounted.insert(image.home(5), 0);
        image.miscounted.insert(2, 3);
    });
    add("lazy refcounts, closed well", SMALL, &|image| {
        put(image, 5, image.home(5), ALL);
        image.has_lazy_refcounts = true;
    });
    add("an autoclear feature that nobody knows", SMALL, &|image| {
        put(image, 5, image.home(5), ALL);
        image.autoclear_features = 1 << 40;
    });
    add("the bit COPIED is missing", SMALL, &|image| {
        put(image, 5, image.home(5), ALL);
        put(image, 6, image.home(9), ALL);
        image.uncopied.extend([5, 6]);
    });
    add("leaks", SMALL, &|image| {
        put(image, 5, image.home(6), ALL);
        let leaked = [image.home(5), image.home(9), image.end() + 3];
        image.leaks.extend(leaked);
        image.garbage.extend(leaked);
    });
    add("leaks that are counted twice", SMALL, &|image| {
        put(image, 5, image.home(6), ALL);
        for leaked in [image.home(5), image.home(9), image.end() + 3] {
            image.miscounted.insert(leaked, 2);
            image.leaks.insert(leaked);
        }
    });
    add("longer than it has to be", SMALL, &|image| {
        put(image, 5, image.home(5), ALL);
        image.length += 7 * image.cluster_size() + 512;
    });
    for disk in [SMALL, FULL] {
        images.push(("emptied", Foreign::emptied(disk.0, disk.1)));
        let mut image = Foreign::emptied(disk.0, disk.1);
        for guest in [200, 3, 4, 2100, 5] {
            image.write(guest, 0x3ff);
        }
        image.zero(2, false);
        images.push(("emptied, and written to", image));
    }
    images
}

pub fn at_random(random: &mut Random) -> Foreign {
    let disk = random.among(&[SMALL, SMALL, SMALL, FULL, NEARLY_FULL, LARGE]);
    let mut image = match random.below(4) {
        0 => Foreign::emptied(disk.0, disk.1),
        _ => new(disk),
    };
    if random.below(4) == 0 {
        amend(&mut image, random.below(7) as u32);
    }
    let guests = guests(&image, random);
    match random.below(5) {
        0 => as_qemu(&mut image, &guests, random),
        1 if !image.l2.is_empty() => permute(&mut image, &guests, random),
        _ => {
            scatter_tables(&mut image, &guests, random);
            scatter(&mut image, &guests, random);
        }
    }
    image.cover();
    spoil(&mut image, random);
    image.cover();
    image
}

/// Some in a row, and some elsewhere.
fn guests(image: &Foreign, random: &mut Random) -> Vec<u64> {
    let count = image.guest_clusters();
    let mut guests: Vec<u64> = Vec::new();
    for _ in 0..1 + random.below(3) {
        let tables = image.entries_per_table();
        let anywhere = random.below(count);
        let first = random.among(&[0, 0, tables - 3, 40, count - 4, anywhere]);
        let most = random.among(&[3, 8, 24]);
        let first = first.min(count - 1);
        guests.extend(first..(first + 1 + random.below(most)).min(count));
    }
    guests.sort_unstable();
    guests.dedup();
    guests
}

fn as_qemu(image: &mut Foreign, guests: &[u64], random: &mut Random) {
    for _ in 0..2 * guests.len() {
        let guest = random.among(guests);
        match random.below(6) {
            0 => image.zero(guest, random.below(2) == 0),
            _ => image.write(guest, bitmap(random) as u32),
        }
    }
}

/// A free place: the home of one of `guests`, or one near the beginning, or beyond the end.
fn place(image: &Foreign, guests: &[u64], random: &mut Random) -> u64 {
    let used = image.used();
    loop {
        let place = match random.below(8) {
            0 => random.below(image.home(0) + 6),
            1 => image.end() + random.below(12),
            2 => random.below(image.end() + 4),
            _ => image.home(random.among(guests)),
        };
        if used.binary_search(&place).is_err() {
            return place;
        }
    }
}

fn scatter_tables(image: &mut Foreign, guests: &[u64], random: &mut Random) {
    if random.below(3) == 0 {
        image.l1 = place(image, guests, random);
        image.l1_size += random.below(3);
    }
    for table in image.l2.clone().into_keys() {
        if random.below(3) == 0 {
            let place = place(image, guests, random);
            image.l2.insert(table, place);
        }
    }
    for block in image.refcount_blocks.clone().into_keys() {
        if random.below(3) == 0 {
            let place = place(image, guests, random);
            image.refcount_blocks.insert(block, place);
        }
    }
    match random.below(4) {
        0 => image.refcount_table = place(image, guests, random),
        1 => {
            image.refcount_table = image.end() + 20;
            image.refcount_table_clusters = 1 + random.below(3);
        }
        _ => {}
    }
}

fn scatter(image: &mut Foreign, guests: &[u64], random: &mut Random) {
    for guest in guests {
        let table = guest / image.entries_per_table();
        if !image.l2.contains_key(&table) {
            let place = place(image, guests, random);
            image.l2.insert(table, place);
        }
        let home = image.home(*guest);
        let is_free = image.used().binary_search(&home).is_err();
        let host = match random.below(3) {
            0 if is_free => home,
            _ => place(image, guests, random),
        };
        let bitmap = match random.below(8) {
            0 => bitmap(random) & !ALL,
            _ => bitmap(random),
        };
        put(image, *guest, host, bitmap);
    }
}

fn spoil(image: &mut Foreign, random: &mut Random) {
    let used = image.used();
    for _ in 0..random.below(5) {
        let number = random.below(image.end() + 8);
        let near = image.home(random.below(12));
        let number = random.among(&[number, near]);
        if used.binary_search(&number).is_err() {
            image.garbage.insert(number);
            if random.below(2) == 0 {
                image.leaks.insert(number);
            }
        }
    }
    if random.below(5) == 0 {
        image.has_lazy_refcounts = true;
    }
    if random.below(9) == 0 {
        image.autoclear_features = 1 << (2 + random.below(62));
    }
    if random.below(4) == 0 {
        image.is_dirty = true;
        image.cover();
        let most = if image.refcount_order == 0 { 1 } else { 3 };
        for _ in 0..1 + random.below(5) {
            let (any, used) = (random.below(image.end()), random.among(&image.used()));
            let number = random.among(&[any, used]);
            if image.is_covered(number) {
                image.miscounted.insert(number, random.below(most + 1));
            }
        }
    }
    if random.below(8) == 0 {
        let led = image.clusters.iter().filter(|(_, c)| c.host.is_some());
        let some = led.filter(|_| random.below(2) == 0);
        image.uncopied = some.map(|(guest, _)| *guest).collect();
    }
    if random.below(6) == 0 {
        image.length += random.below(9 * image.cluster_size());
    }
}
