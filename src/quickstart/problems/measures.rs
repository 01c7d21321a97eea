//! Problems that pre-training does not see: lengths, averages, hours, legs and lowered prices. The fine-tuning
//! quickstart teaches them to a model that knows the other kinds.

use super::Operator::{Minus, Over, Plus, Times};
use super::{Draft, Draw, count, dollars, draft};

/// The way around a rectangle.
pub fn perimeter(draw: &mut Draw) -> Draft {
    let (place, around) =
        draw.pick(&[("garden", "fence"), ("field", "wall"), ("park", "path"), ("table", "ribbon"), ("room", "border")]);
    let (long, wide) = (draw.number(3, 20), draw.number(2, 19));
    let question = match draw.number(0, 1) {
        0 => format!("A {place} is {long} meters long and {wide} meters wide. How long is the {around} around it?"),
        _ => format!("How long is a {around} around a {place} of {long} by {wide} meters?"),
    };
    let half = count(long, Plus, wide);
    let all = count(half.value, Plus, half.value);
    let steps = [format!("Two sides are {} meters.", half.text), format!("Four sides are {} meters.", all.text)];
    draft(question, steps, all.value)
}

/// The average of two scores.
pub fn average(draw: &mut Draw) -> Draft {
    let who = draw.person();
    let (name, pronoun) = (who.name, who.pronoun);
    let (average, apart) = (draw.number(6, 25), draw.number(1, 5));
    let (first, second) = (average - apart, average + apart);
    let question = match draw.number(0, 1) {
        0 => format!("{name} scores {first} and {second} points in 2 games. What is the average?"),
        _ => format!("In 2 games {name} scores {second} and {first} points. How many does {pronoun} average?"),
    };
    let sum = count(first, Plus, second);
    let mean = count(sum.value, Over, 2);
    let steps = [format!("The sum is {}.", sum.text), format!("The average is {} points.", mean.text)];
    draft(question, steps, mean.value)
}

/// Hours and minutes as minutes.
pub fn minutes(draw: &mut Draw) -> Draft {
    let name = draw.person().name;
    let verb = draw.pick(&["reads", "runs", "sings", "works"]);
    let (hours, more) = (draw.number(2, 4), 5 * draw.number(1, 11));
    let question = format!("{name} {verb} for {hours} hours of 60 minutes and {more} minutes. How many minutes is it?");
    let whole = count(hours, Times, 60);
    let all = count(whole.value, Plus, more);
    let steps = [format!("The hours are {} minutes.", whole.text), format!("In all it is {} minutes.", all.text)];
    draft(question, steps, all.value)
}

/// Legs of two kinds of animals.
pub fn legs(draw: &mut Draw) -> Draft {
    let two = draw.pick(&["hens", "ducks", "geese", "owls"]);
    let four = draw.pick(&["cows", "goats", "horses", "dogs"]);
    let place = draw.pick(&["farm", "meadow", "zoo"]);
    let (few, many) = (draw.number(2, 9), draw.number(2, 9));
    let question =
        format!("A {place} has {few} {two} with 2 legs and {many} {four} with 4 legs. How many legs are there?");
    let (first, second) = (count(few, Times, 2), count(many, Times, 4));
    let all = count(first.value, Plus, second.value);
    let steps = [
        format!("The {two} have {} legs.", first.text),
        format!("The {four} have {} legs.", second.text),
        format!("Together they have {} legs.", all.text),
    ];
    draft(question, steps, all.value)
}

/// Several things at a price that has fallen.
pub fn lowered_price(draw: &mut Draw) -> Draft {
    let (who, what) = (draw.person(), draw.thing());
    let (name, one, many) = (who.name, what.one, what.many);
    let (price, number) = (draw.number(2, 9), draw.number(2, 9));
    let off = draw.number(2, 9);
    let before = price + off;
    let question = match draw.number(0, 1) {
        0 => format!("One {one} costs ${before}, now ${off} less. {name} buys {number} {many}. How much is it?"),
        _ => format!("The price of one {one} falls by ${off} from ${before}. What do {number} {many} cost {name}?"),
    };
    let now = dollars(before, Minus, off);
    let total = dollars(number, Times, now.value);
    let steps = [format!("One {one} costs {} now.", now.text), format!("The {many} cost {}.", total.text)];
    draft(question, steps, total.value)
}
