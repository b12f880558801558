"""The kernels for Hopper, their work divided among warps.

Two groups of four warps compute, each for 64 rows of a tile of 128 queries (or keys), and one warp
keeps the blocks that they meet coming. A group's products run beside the other group's arithmetic,
in the backward pass beside its own too. There is a program to a multiprocessor, which takes the
next tile that is left when it has copied one, the longest lists first: the blocks of the next are
on their way while the last is written, and none waits for lists longer than its own. The walk over
lists or a band is that of the portable kernels (``walk``); what these take: whole tiles, one head a
tile, one width of 64 or 128 for q, k and v.

Legend: D the width; BN keys and BM queries of a step; t steps (of all tiles) and n tiles so far,
which say whose turn a slot of the ring of STAGES blocks, or of a tile's, is; ``*_s`` blocks in
shared memory, ``*full`` and ``*free`` their barriers; TAKEN counts the tiles that were taken beside
each program's first.
"""
