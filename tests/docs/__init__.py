"""Documentation that runs: blocks, links and language of README.md and vmm/docs."""
