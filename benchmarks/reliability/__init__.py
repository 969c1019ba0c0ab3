"""Promises about runs and foreign files, each a command that anyone can repeat.

`python -m benchmarks.reliability.kills --count 200 --seed 0 --json kills.json` is one of them,
`python -m benchmarks.reliability all --quick --json DIR` all.
A trial is a function of the seed and its number alone: `--only NUMBER` repeats one that failed.
"""
