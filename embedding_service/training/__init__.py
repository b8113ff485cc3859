"""Tables that learn: what a shard needs for its part of a branch.

`branch` says what a branch is and where it lies. `share` is one shard's part of it. `tables` have its rows,
`optimizers` change them, `log` and `checkpoints` bring them back. `push` reads and checks what workers send.
`publishing` makes a version of a checkpoint.
"""
