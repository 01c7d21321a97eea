//! Random words and numbers for the word problems.

use crate::random::below;
use rand_chacha::ChaCha8Rng;

/// Someone in a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Person {
    pub name: &'static str,
    /// "he" or "she".
    pub pronoun: &'static str,
}

/// Something that can be counted, bought and given away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thing {
    pub one: &'static str,
    pub many: &'static str,
}

const SHE: [&str; 12] =
    ["Anna", "Clara", "Emma", "Grace", "Ivy", "Julia", "Kate", "Lily", "Maria", "Nina", "Rosa", "Zoe"];

const HE: [&str; 12] = ["Adam", "Ben", "Carl", "David", "Eric", "Frank", "Henry", "Jack", "Leo", "Noah", "Paul", "Tom"];

const THINGS: [Thing; 20] = [
    thing("apple", "apples"),
    thing("ball", "balls"),
    thing("book", "books"),
    thing("button", "buttons"),
    thing("cake", "cakes"),
    thing("candle", "candles"),
    thing("card", "cards"),
    thing("coin", "coins"),
    thing("cookie", "cookies"),
    thing("cup", "cups"),
    thing("flower", "flowers"),
    thing("kite", "kites"),
    thing("lemon", "lemons"),
    thing("marble", "marbles"),
    thing("muffin", "muffins"),
    thing("orange", "oranges"),
    thing("pen", "pens"),
    thing("ribbon", "ribbons"),
    thing("shell", "shells"),
    thing("stamp", "stamps"),
];

const fn thing(one: &'static str, many: &'static str) -> Thing {
    Thing { one, many }
}

/// Draws the parts of one problem.
pub struct Draw<'a>(pub &'a mut ChaCha8Rng);

impl Draw<'_> {
    /// Uniform in low..=high.
    pub fn number(&mut self, low: u32, high: u32) -> u32 {
        low + below(self.0, u64::from(high - low) + 1) as u32
    }

    /// A number that is easy to add and to take away: one digit or whole tens, from 2 to `most`.
    pub fn easy(&mut self, most: u32) -> u32 {
        if most < 10 || below(self.0, 2) == 0 {
            self.number(2, most.min(9))
        } else {
            10 * self.number(1, most.min(50) / 10)
        }
    }

    pub fn pick<T: Copy>(&mut self, options: &[T]) -> T {
        options[below(self.0, options.len() as u64) as usize]
    }

    pub fn person(&mut self) -> Person {
        if below(self.0, 2) == 0 {
            Person { name: self.pick(&SHE), pronoun: "she" }
        } else {
            Person { name: self.pick(&HE), pronoun: "he" }
        }
    }

    /// Two people with different names.
    pub fn people(&mut self) -> (Person, Person) {
        let first = self.person();
        loop {
            let second = self.person();
            if second != first {
                return (first, second);
            }
        }
    }

    pub fn thing(&mut self) -> Thing {
        self.pick(&THINGS)
    }
}
