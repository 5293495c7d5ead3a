"""What the model has read, kept: the keys and values of every layer.

A token's key and value depend on the tokens before it and on nothing that comes later, so they are worked out once.
Without a cache, token n costs a pass over n tokens; with one it costs a pass over one, which looks at n kept keys.

The price is memory: 2 x layers x K x D numbers for each position. A window bounds it: the key of the position that
leaves the window is overwritten by the newest (a rolling buffer), so a longer text needs no more.
"""

from shared.errors import BadInput

import torch


class Cache:
    """Room for the keys and values of B texts, allocated once.

    Each position has a slot: the first n_sink keep theirs, the others take turns.

        n_sink = 1, room for 3 more:   after 0 1 2 3: [0, 1, 2, 3]   then 4: [0, 4, 2, 3]   then 5: [0, 4, 5, 3]

    Texts have lengths of their own. What padding would keep goes to a spare slot, which nobody reads.
    Raises BadInput for a batch, or a number of tokens at once, below 1.
    """

    def __init__(self, model, batch_size: int = 1, most: int = 1):
        """`most` tokens may come at once. The buffer has as many slots beside the window, less one: a token that comes
        must not overwrite what the first of its companions still looks at."""
        if batch_size < 1 or most < 1:
            raise BadInput(f"a cache for {batch_size} texts and {most} tokens at once: both must be at least 1")
        config, like = model.config, model.tok_emb.weight
        self.n_sink, self.most = config.n_sink, most
        self.n_slot = config.n_sink + config.span + most - 1
        shape = (config.n_layer, batch_size, config.n_kv_head, self.n_slot + 1, config.head_dim)
        # The last slot is the spare one. Memory that nothing was written to yet takes no room in the machine.
        self.keys, self.values = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.places = torch.full((batch_size, self.n_slot + 1), -1, device=like.device)  # whose each is, -1: none
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=like.device)  # tokens that each text has so far
        self.rows = torch.arange(batch_size, device=like.device)[:, None]  # [B, 1]
        self.slots = None  # where the tokens go that come now: [B, T]
        self.run = None  # the same as a slice, where there is one text and its slots lie side by side: quicker to write
        self.used = 0  # the first slots, which may be read: the others hold nothing

    def advance(self, positions):
        """Make room for new tokens, at `positions` [1 or B, T] counted from the first new one, below 0 for padding.

        Returns where they stand in their texts [B, T], and the positions of all slots that may be read [B, S].
        Raises BadInput for more tokens at once than there is room for.
        """
        B, T = len(self.lengths), positions.shape[1]
        if T > self.most:
            raise BadInput(f"{T} tokens at once, and the cache was made for {self.most}: give them in pieces")
        real = (positions >= 0).expand(B, T)
        positions = torch.where(real, positions + self.lengths[:, None], -1)
        turn = self.n_sink + (positions - self.n_sink) % (self.n_slot - self.n_sink)
        self.slots = torch.where(real, torch.where(positions < self.n_sink, positions, turn), self.n_slot)
        self.places[self.rows, self.slots] = positions
        first, last = (int(self.slots[0, i]) for i in (0, -1)) if B == 1 and T else (0, 0)
        self.run = slice(first, last + 1) if B == 1 and last - first == T - 1 else None
        self.lengths = self.lengths + real.sum(1)
        before, self.used = self.used, min(self.n_slot, int(self.lengths.max()))
        # Not every text fills all of these. What is hidden counts 0 times, but 0 times a nan left in memory is nan.
        self.keys[..., before:self.used, :] = self.values[..., before:self.used, :] = 0
        return positions, self.places[:, :self.used]

    def update(self, layer: int, k, v):
        """Keep the new keys and values [B, K, T, D] of a layer: all that are kept, [B, K, S, D] x 2."""
        kept = []
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            new = new.to(store.dtype)  # autocast has made them bfloat16 where the weights are float32
            if self.run is not None:
                store[:, :, self.run] = new
            else:
                store[self.rows, :, self.slots] = new.transpose(1, 2)  # [B, T, K, D]
            kept.append(store[:, :, :self.used])
        return kept

    def rewind(self, lengths):
        """Forget all from position `lengths` [B] on: tokens that were tried and not taken.

        They stay in their slots, in the future of all that comes, until the tokens that come take these slots. At most
        `most` tokens can be taken back: what stood in the slots before them is gone, and further back it is needed.
        """
        self.lengths = lengths

    @property
    def nbytes(self) -> int:
        """Bytes that the kept keys and values take."""
        return self.keys.nbytes + self.values.nbytes
