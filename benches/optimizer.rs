//! The optimizer step beside the time that memory needs: `cargo bench --bench optimizer [-- PAIRS]`.

fn main() -> anyhow::Result<()> {
    let pairs = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(11);
    vrtrain::commands::bench::optimizer(pairs, vrtrain::config::DeviceChoice::Cpu, false)?;
    Ok(())
}
