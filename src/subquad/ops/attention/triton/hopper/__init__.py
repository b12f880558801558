"""The kernels for Hopper, their work divided among warps.

Two groups of four warps compute, each for 64 rows of a tile of 128 queries (or keys), and one warp
keeps the blocks that they meet coming. A group's products run beside its own exponentials, and
beside the other group's. A program takes tile after tile, so that the blocks of the next are on
their way while the last is written. The walk over lists or a band is that of the portable kernels
(``walk``); what these take: whole tiles, one head a tile, one width of 64 or 128 for q, k and v.

Legend: D the width; BN keys and BM queries of a step; t steps (of all tiles) so far, which say
whose turn a slot of the ring of STAGES blocks is; ``*_s`` blocks in shared memory, ``*_full`` and
``*_free`` their barriers.
"""
