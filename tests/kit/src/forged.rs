//! Recordings that no recorder wrote, with the checksums that it would have written.

const WORD: usize = 8;
/// Size of the header of a file, and of a block.
pub const HEADER: usize = 64;
/// Size of a block with its header.
pub const BLOCK: usize = 64 * 1024;
/// Maximum number of words in a block.
pub const WORDS: usize = (BLOCK - HEADER) / WORD;

/// A block: the fields of its header, and its words.
#[derive(Clone, Debug)]
pub struct Block<'a> {
    /// Number of blocks written before.
    pub number: u64,
    /// The word with which the first record begins.
    pub first: u64,
    /// The clock before that record.
    pub time: u64,
    pub words: &'a [u64],
}

/// The file of these blocks, each in its place. `payloads`: 0 for none, 1 for hashes, 2 for all.
pub fn file(payloads: u64, max_blocks: u64, blocks: &[Block<'_>]) -> Vec<u8> {
    let magic = u64::from_le_bytes(*b"PORTREC1");
    let known = [magic, payloads, BLOCK as u64, max_blocks, 0, 0, 0];
    let mut file = Vec::new();
    for word in known.into_iter().chain([checksum(known)]) {
        file.extend(word.to_le_bytes());
    }
    for block in blocks {
        let slot = usize::try_from(block.number % max_blocks).expect("as many as there are");
        let at = HEADER + slot * BLOCK;
        let end = at + HEADER + block.words.len() * WORD;
        file.resize(file.len().max(end), 0);
        let used = block.words.len() as u64;
        let header = [0, block.number, used, block.first, block.time, 0, 0, 0];
        let words = header.iter().chain(block.words);
        for (place, word) in file[at..].chunks_exact_mut(WORD).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        seal(&mut file[at..]);
    }
    file
}

/// The words of all blocks, in the order of the file.
pub fn words(file: &[u8]) -> Vec<u64> {
    let blocks = file.get(HEADER..).unwrap_or_default().chunks(BLOCK);
    let words = blocks.flat_map(|block| {
        let used = usize::try_from(word(block, 2)).expect("at most a block");
        (8..8 + used).map(|at| word(block, at))
    });
    words.collect()
}

/// Computes the checksum of a block anew.
pub fn seal(block: &mut [u8]) {
    let used = usize::try_from(word(block, 2)).expect("at most a block");
    let content = checksum((8..8 + used).map(|at| word(block, at)));
    let sum = checksum((1..5).map(|at| word(block, at)).chain([content]));
    block[..WORD].copy_from_slice(&sum.to_le_bytes());
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let bytes = &bytes[at * WORD..][..WORD];
    u64::from_le_bytes(bytes.try_into().expect("eight"))
}

fn checksum(words: impl IntoIterator<Item = u64>) -> u64 {
    words.into_iter().fold(0xCBF2_9CE4_8422_2325, |sum, word| {
        (sum ^ word)
            .wrapping_mul(0x0000_0100_0000_01B3)
            .rotate_left(17)
    })
}
