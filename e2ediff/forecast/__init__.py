"""Forecast what a recipe costs before it is run: arithmetic, memory, time and disk.

Passes are counted on the meta device, and memory is followed through a step on fake tensors. What
neither shows (a device's peak rate, the share of it that is reached) is an assumption that
`e2ediff plan` prints with its source.
"""
