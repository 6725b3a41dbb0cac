"""Who looks on or interferes while a guest runs: console, signals, status line, control socket."""
