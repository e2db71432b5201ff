"""Floor 0: words that every other floor uses. No network, no process group, no trainer."""
