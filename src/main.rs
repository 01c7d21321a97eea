//! The binary: parse the command line, run the command, print the error chain once, choose the exit code.

fn main() -> std::process::ExitCode {
    vrtrain::cli::main()
}
