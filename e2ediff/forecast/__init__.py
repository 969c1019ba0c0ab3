"""What a recipe will cost before it is run: arithmetic, memory, time and disk.

Passes are counted on the meta device, memory is followed through a step on fake tensors, and
what neither can know (a device's ceiling, the share of it that is reached) is an assumption
that `e2ediff plan` prints with its source.
"""
