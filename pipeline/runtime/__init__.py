"""How a command runs: options, messages, files that appear whole, processes, threads."""
