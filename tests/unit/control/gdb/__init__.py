"""The debugger's side: packets, sessions, and a guest of fake vCPUs behind them."""
