//! The radix tree of the block map: nodes, leaves, and how they come and go. Its
//! invariants are those of [`super`].
//!
//! # Readers take no lock
//!
//! A leaf or a node that is all zeroes is *unlinked*: its slot becomes [`ZEROED`]. A reader
//! may be in it at that time, so it must not be freed. It is kept, and serves as another leaf or
//! node of the same map later ([`Pool`]); memory goes back to the system with the map. So
//! what a reader follows always leads to a leaf or a node, but that may be in charge of
//! another part of the disk by now. (Each level has nodes of its own. One that came back on
//! another level would lead a reader from a node to what it takes for a leaf.)
//!
//! That is found out: `unlinked` moves on with each unlinking, before the memory can be
//! used again. [`Tree::look`] reads it before and after, and looks once more if it has
//! moved. The argument: let a reader see something that was stored in a leaf or a node
//! after it was unlinked. It was stored behind a *release* fence that comes after `unlinked`
//! has moved, and the reader has an *acquire* fence between what it has seen and its second look
//! at `unlinked`: so that look sees that it has moved. The first look can't have seen it
//! already, because who sees it (*acquire*) sees the slot as it was changed before that.
//!
//! # Writers have a hold
//!
//! Who changes blocks holds their stripes, and who unlinks what is in charge of blocks
//! holds the stripes of all of them exclusively. So nobody changes a leaf or a node that
//! is unlinked, and who holds a block's stripe needs no second look.

use std::alloc::{self, Layout};
use std::array;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use super::leaf::{BLOCKS_PER_LEAF, Leaf};
use crate::error::{Error, Result};
use crate::overlay::budget::{Account, Share};
use crate::sync::{AtomicPtr, AtomicU64, Mutex, Ordering, fence, locked};

const SLOTS_SHIFT: u32 = if cfg!(loom) { 1 } else { 9 };
const SLOTS: usize = 1 << SLOTS_SHIFT;
const LEAF_SHIFT: u32 = BLOCKS_PER_LEAF.trailing_zeros();

/// Stands in a slot for a node or a leaf whose every block is *zero* and not stored. No
/// allocation has this address, because those are aligned.
const ZEROED: *mut u8 = ptr::without_provenance_mut(1);

/// A slot points to another node, to a leaf on the lowest level, or nowhere.
type Slot = AtomicPtr<u8>;

struct Node {
    slots: [Slot; SLOTS],
    next: AtomicPtr<u8>,
}

/// What a slot leads to.
pub enum Found<'a> {
    /// Every block is *base*.
    Untouched,
    /// Every block is *zero*, and not stored.
    Zeroed,
    Leaf(&'a Leaf),
}

/// See the module's documentation.
pub struct Tree {
    /// On top of `levels` levels of nodes.
    root: Slot,
    levels: u32,
    /// The root is in charge of 2^`shift` blocks.
    shift: u32,
    blocks: u64,
    /// How often something was unlinked.
    unlinked: AtomicU64,
    /// Of each level its own: a reader may be in one, and takes what it points to for one
    /// of the level below.
    nodes: Vec<Pool<Node>>,
    leaves: Pool<Leaf>,
    /// With a limit: held while a slot gets a node or a leaf. Who is refused the memory for one
    /// must know that nobody else has just been given it. Who holds this may wait for room.
    growing: Mutex<()>,
}

/// A place in the tree: a slot, how many levels of nodes are below it, and its first block.
#[derive(Clone, Copy)]
struct Place<'a> {
    slot: &'a Slot,
    level: u32,
    start: u64,
}

impl<'a> Place<'a> {
    /// How many blocks the slot is in charge of: at most 2^56, see `MAX_BLOCKS`.
    fn span(self) -> u64 {
        1 << (self.level * SLOTS_SHIFT + LEAF_SHIFT)
    }

    /// What the slot leads to, which is neither null nor [`ZEROED`].
    fn child(self, target: *mut u8, block: u64) -> Place<'a> {
        // SAFETY: above the lowest level such a slot points to a node that `Tree::grow`
        // made. Nodes are not freed before the tree, which is borrowed for 'a.
        let node: &'a Node = unsafe { &*target.cast::<Node>() };
        let level = self.level - 1;
        let span = self.span() >> SLOTS_SHIFT;
        let index = (block - self.start) / span;
        Place {
            slot: &node.slots[index as usize],
            level,
            start: self.start + index * span,
        }
    }

    /// The same on the lowest level.
    fn leaf(self, target: *mut u8) -> &'a Leaf {
        debug_assert_eq!(self.level, 0);
        // SAFETY: as in `child`; on the lowest level it is a leaf.
        unsafe { &*target.cast::<Leaf>() }
    }
}

#[inline(always)]
fn is_pointer(target: *mut u8) -> bool {
    // Neither null nor ZEROED.
    target.addr() > ZEROED.addr()
}

impl Tree {
    /// For `blocks` blocks, all of them *base*.
    pub fn new(blocks: u64) -> Self {
        let leaves = blocks.div_ceil(BLOCKS_PER_LEAF);
        let mut levels = 0;
        while leaves > 1 << (levels * SLOTS_SHIFT) {
            levels += 1;
        }
        Tree {
            root: AtomicPtr::new(ptr::null_mut()),
            levels,
            shift: levels * SLOTS_SHIFT + LEAF_SHIFT,
            blocks,
            unlinked: AtomicU64::new(0),
            nodes: (0..levels).map(|_| Pool::new()).collect(),
            leaves: Pool::new(),
            growing: Mutex::new(()),
        }
    }

    /// Has the memory of what is made from now on charged to `account`.
    pub fn limit(&mut self, account: &Arc<Account>) {
        for nodes in &mut self.nodes {
            nodes.account = Some(Arc::clone(account));
        }
        self.leaves.account = Some(Arc::clone(account));
    }

    pub fn is_untouched(&self) -> bool {
        self.root.load(Ordering::Acquire).is_null()
    }

    /// How many bytes the nodes and the leaves take.
    pub fn memory(&self) -> u64 {
        self.nodes.iter().map(Pool::memory).sum::<u64>() + self.leaves.memory()
    }

    /// What `look` sees, which takes no stripe.
    #[inline(always)]
    pub fn look<'a, R>(&'a self, look: impl Fn(&'a Self) -> R) -> R {
        loop {
            let before = self.unlinked.load(Ordering::Acquire);
            let found = look(self);
            fence(Ordering::Acquire);
            if self.unlinked.load(Ordering::Relaxed) == before {
                return found;
            }
        }
    }

    fn root(&self) -> Place<'_> {
        Place {
            slot: &self.root,
            level: self.levels,
            start: 0,
        }
    }

    /// What is in charge of `block`, and the first block after those that it is in charge
    /// of. (A mark or a missing node is in charge of much.)
    #[inline(always)]
    pub fn lookup(&self, block: u64) -> (Found<'_>, u64) {
        let mut slot = &self.root;
        let mut shift = self.shift;
        loop {
            let target = slot.load(Ordering::Acquire);
            if !is_pointer(target) || shift == LEAF_SHIFT {
                let end = ((block >> shift) + 1) << shift;
                let found = if target.is_null() {
                    Found::Untouched
                } else if target == ZEROED {
                    Found::Zeroed
                } else {
                    // SAFETY: as in `Place::leaf`.
                    Found::Leaf(unsafe { &*target.cast::<Leaf>() })
                };
                return (found, end);
            }
            shift -= SLOTS_SHIFT;
            // SAFETY: as in `Place::child`.
            let node = unsafe { &*target.cast::<Node>() };
            slot = &node.slots[(block >> shift) as usize % SLOTS];
        }
    }

    /// The leaf of `block`, made if there is none yet, with all nodes on the way there.
    #[inline]
    pub fn leaf(&self, block: u64, share: Share) -> Result<&Leaf> {
        match self.lookup(block).0 {
            Found::Leaf(leaf) => Ok(leaf),
            _ => self.new_leaf(block, share),
        }
    }

    #[cold]
    fn new_leaf(&self, block: u64, share: Share) -> Result<&Leaf> {
        let mut place = self.root();
        loop {
            let target = self.grown(place, share)?;
            if place.level == 0 {
                return Ok(place.leaf(target));
            }
            place = place.child(target, block);
        }
    }

    /// Makes the blocks from `at` on zeroes, up to `end` or before it. Where a slot is in
    /// charge of nothing else and has nothing below it, it is marked, on the highest level
    /// that there is. Else there is a leaf, whose words are left to the caller.
    /// Returns whether a mark was set, the leaf, and the first block after what this was
    /// about.
    ///
    /// Without `marks` nothing is marked: it is only made what has to be made.
    pub fn zero(
        &self,
        at: u64,
        end: u64,
        marks: bool,
        share: Share,
    ) -> Result<(bool, Option<&Leaf>, u64)> {
        let mut place = self.root();
        loop {
            let target = place.slot.load(Ordering::Acquire);
            let place_end = (place.start + place.span()).min(self.blocks);
            let limit = end.min(place_end);
            if target == ZEROED {
                return Ok((false, None, limit));
            }
            if target.is_null() {
                let is_whole = at == place.start && limit == place_end;
                if !is_whole {
                    self.grown(place, share)?;
                } else if !marks || exchange(place.slot, target, ZEROED) {
                    return Ok((marks, None, limit));
                }
                // What is there now is looked at.
            } else if place.level == 0 {
                return Ok((false, Some(place.leaf(target)), limit));
            } else {
                place = place.child(target, at);
            }
        }
    }

    /// What the slot points to; if that is nothing yet, a node or a leaf in which every
    /// block is what the slot says.
    fn grown(&self, place: Place<'_>, share: Share) -> Result<*mut u8> {
        let is_limited = self.leaves.account.is_some();
        let _growing = is_limited.then(|| locked(&self.growing));
        loop {
            let target = place.slot.load(Ordering::Acquire);
            if is_pointer(target) {
                return Ok(target);
            }
            if place.level == 0 {
                self.leaves.link(place.slot, target, share)?;
            } else {
                self.nodes[place.level as usize - 1].link(place.slot, target, share)?;
            }
        }
    }

    /// How much memory it takes, at most, that each block of `blocks` has a leaf.
    pub fn memory_for(&self, blocks: &Range<u64>) -> u64 {
        let mut memory = 0;
        let mut at = blocks.start;
        while at < blocks.end {
            let (has_leaf, part_end) = self.look(|tree| {
                let (found, end) = tree.lookup(at);
                (matches!(found, Found::Leaf(_)), end)
            });
            let end = part_end.min(blocks.end);
            if !has_leaf {
                let leaves = (end - 1) / BLOCKS_PER_LEAF - at / BLOCKS_PER_LEAF + 1;
                memory += leaves * size_of::<Leaf>() as u64;
                if part_end / BLOCKS_PER_LEAF - at / BLOCKS_PER_LEAF > 1 {
                    memory += u64::from(self.levels) * size_of::<Node>() as u64;
                }
            }
            at = end;
        }
        memory
    }

    /// If the lowest node or leaf that is in charge of `block` is all zeroes, and nothing
    /// of it is stored: the blocks of which it is in charge.
    pub fn zeroed_around(&self, block: u64) -> Option<Range<u64>> {
        self.look(|tree| {
            let mut place = tree.root();
            let mut target = place.slot.load(Ordering::Acquire);
            if !is_pointer(target) {
                return None;
            }
            while place.level > 0 {
                let child = place.child(target, block);
                let below = child.slot.load(Ordering::Acquire);
                if !is_pointer(below) {
                    break;
                }
                (place, target) = (child, below);
            }
            let blocks = place.start..(place.start + place.span()).min(tree.blocks);
            let is_zeroed = if place.level == 0 {
                place.leaf(target).is_zeroed(blocks.start, blocks.end)
            } else {
                tree.children(place, target, &blocks)
                    .all(|child| child.slot.load(Ordering::Acquire) == ZEROED)
            };
            is_zeroed.then_some(blocks)
        })
    }

    /// Unlinks the leaves and nodes that are in charge of `blocks` or of some of them, and
    /// of no others, and in which everything is zeroed and nothing is stored. The stripes
    /// of `blocks` are held exclusively.
    pub fn prune(&self, blocks: &Range<u64>) {
        self.prune_place(self.root(), blocks);
    }

    /// Returns whether the place is marked as zeroed by then.
    fn prune_place(&self, place: Place<'_>, blocks: &Range<u64>) -> bool {
        let target = place.slot.load(Ordering::Acquire);
        if !is_pointer(target) {
            return target == ZEROED;
        }
        let end = (place.start + place.span()).min(self.blocks);
        let is_whole = blocks.start <= place.start && end <= blocks.end;
        if place.level == 0 {
            let is_zeroed = is_whole && place.leaf(target).is_zeroed(place.start, end);
            if is_zeroed {
                self.unlink(place.slot);
                self.leaves.put(target.cast());
            }
            return is_zeroed;
        }
        let part = blocks.start.max(place.start)..blocks.end.min(end);
        let mut is_zeroed = is_whole;
        for child in self.children(place, target, &part) {
            is_zeroed &= self.prune_place(child, blocks);
        }
        if is_zeroed {
            self.unlink(place.slot);
            self.nodes[place.level as usize - 1].put(target.cast());
        }
        is_zeroed
    }

    /// The places below one that are in charge of `blocks`, which lie in it.
    fn children<'a>(
        &self,
        place: Place<'a>,
        target: *mut u8,
        blocks: &Range<u64>,
    ) -> impl Iterator<Item = Place<'a>> + use<'a> {
        let step = place.span() >> SLOTS_SHIFT;
        let first = blocks.start / step * step;
        (first..blocks.end)
            .step_by(step as usize)
            .map(move |block| place.child(target, block))
    }

    fn unlink(&self, slot: &Slot) {
        slot.store(ZEROED, Ordering::Release);
        // Before the memory is used again, and after the slot leads elsewhere.
        self.unlinked.fetch_add(1, Ordering::AcqRel);
    }

    /// Frees what a slot points to, `level` levels of nodes and the leaves below.
    fn free(target: *mut u8, level: u32) {
        if !is_pointer(target) {
            return;
        }
        if level == 0 {
            // SAFETY: a leaf that the pool made; the map is being dropped, so nobody
            // else can reach it.
            drop(unsafe { Box::from_raw(target.cast::<Leaf>()) });
            return;
        }
        // SAFETY: as for the leaf, a node.
        let node = unsafe { Box::from_raw(target.cast::<Node>()) };
        for slot in &node.slots {
            Self::free(slot.load(Ordering::Acquire), level - 1);
        }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        Self::free(self.root.load(Ordering::Acquire), self.levels);
    }
}

fn exchange(slot: &Slot, old: *mut u8, new: *mut u8) -> bool {
    slot.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
        .is_ok()
}

/// What a slot can point to.
trait Part: Sized {
    /// With every block *zero* and not stored, or *base*.
    fn new(is_zeroed: bool) -> Self;

    /// Makes it what [`Part::new`] makes. A reader may be in it.
    fn renew(&self, is_zeroed: bool);

    /// The next one of those that are not in use.
    fn next(&self) -> &AtomicPtr<u8>;
}

impl Part for Leaf {
    fn new(is_zeroed: bool) -> Self {
        Leaf::new(is_zeroed)
    }

    fn renew(&self, is_zeroed: bool) {
        self.renew(is_zeroed);
    }

    fn next(&self) -> &AtomicPtr<u8> {
        &self.next
    }
}

impl Node {
    fn slot(is_zeroed: bool) -> *mut u8 {
        if is_zeroed { ZEROED } else { ptr::null_mut() }
    }
}

impl Part for Node {
    fn new(is_zeroed: bool) -> Self {
        Node {
            slots: array::from_fn(|_| AtomicPtr::new(Self::slot(is_zeroed))),
            next: AtomicPtr::new(ptr::null_mut()),
        }
    }

    fn renew(&self, is_zeroed: bool) {
        for slot in &self.slots {
            slot.store(Self::slot(is_zeroed), Ordering::Relaxed);
        }
    }

    fn next(&self) -> &AtomicPtr<u8> {
        &self.next
    }
}

/// The leaves, or the nodes, of a tree: makes them, and keeps those that are not in use.
struct Pool<T: Part> {
    /// A chain of those that are not in use.
    unused: Mutex<Chain<T>>,
    made: AtomicU64,
    account: Option<Arc<Account>>,
}

struct Chain<T>(*mut T);

// SAFETY: what the chain has, nobody else changes, and readers of it change nothing.
unsafe impl<T: Send> Send for Chain<T> {}

impl<T: Part> Pool<T> {
    fn new() -> Self {
        Pool {
            unused: Mutex::new(Chain(ptr::null_mut())),
            made: AtomicU64::new(0),
            account: None,
        }
    }

    fn memory(&self) -> u64 {
        self.made.load(Ordering::Relaxed) * size_of::<T>() as u64
    }

    /// Puts one into `slot` in place of `old`, which is null or [`ZEROED`]; or somebody
    /// else was faster.
    fn link(&self, slot: &Slot, old: *mut u8, share: Share) -> Result<()> {
        let new = self.take(old == ZEROED, share)?;
        if !exchange(slot, old, new.cast()) {
            self.put(new);
        }
        Ok(())
    }

    fn take(&self, is_zeroed: bool, share: Share) -> Result<*mut T> {
        let mut unused = locked(&self.unused);
        let first = unused.0;
        if first.is_null() {
            drop(unused);
            return self.make(is_zeroed, share);
        }
        // SAFETY: what is in the chain was made by `make` and is not freed before the pool.
        let part = unsafe { &*first };
        unused.0 = part.next().load(Ordering::Relaxed).cast();
        drop(unused);
        // For readers that are still in it: see the module's documentation.
        fence(Ordering::Release);
        part.renew(is_zeroed);
        Ok(first)
    }

    fn make(&self, is_zeroed: bool, share: Share) -> Result<*mut T> {
        let len = size_of::<T>() as u64;
        if let Some(account) = &self.account {
            account.take(len, share)?;
        }
        // Not `Box::new`, which ends the process where there is no memory.
        // SAFETY: neither a leaf nor a node has size zero.
        let new = unsafe { alloc::alloc(Layout::new::<T>()) }.cast::<T>();
        if new.is_null() {
            if let Some(account) = &self.account {
                account.give_back(len);
            }
            return Err(Error::no_memory("no memory for the block map"));
        }
        // SAFETY: allocated with the layout of `T`, and nobody else has seen it.
        unsafe { new.write(T::new(is_zeroed)) };
        self.made.fetch_add(1, Ordering::Relaxed);
        Ok(new)
    }

    /// Takes back one that no slot points to.
    fn put(&self, part: *mut T) {
        let mut unused = locked(&self.unused);
        // SAFETY: as in `take`.
        let next = unsafe { &*part }.next();
        next.store(unused.0.cast(), Ordering::Relaxed);
        unused.0 = part;
    }
}

impl<T: Part> Drop for Pool<T> {
    fn drop(&mut self) {
        let mut unused = locked(&self.unused).0;
        while !unused.is_null() {
            // SAFETY: as in `take`; the map is being dropped, so nobody else can reach it.
            let part = unsafe { Box::from_raw(unused) };
            unused = part.as_ref().next().load(Ordering::Relaxed).cast();
        }
    }
}
