"""pass-KV: keys and values go round a ring while queries stay (arXiv 2310.01889, 2411.01783)."""

from collections.abc import Mapping

from torch import Tensor

from longspan.parallel.exchange import Job, LayerExchange
from longspan.parallel.ring import Stage
from longspan.parallel.transport import Wait


def pass_kv(layer: LayerExchange) -> Job:
    """Every rank's keys visit every rank that has queries for them.

    At each hop a rank hands on the block that it holds and attends to it while it travels; with
    several hosts, blocks cross to the next host while they go round the ranks of this one.
    R - 1 sends a rank; for even shards `(R - 1) * S / R * 2 * G * D` numbers, of which those of
    `N - 1` sends cross to another of N hosts.
    """
    ring = layer.exchange.ring
    own = layer.exchange.rank
    state, states = layer.own_states()
    blocks: Mapping[int, Tensor] = {own: layer.pack_keys(ring.travellers(own, (0, 0)))}
    for lap in range(ring.num_hosts):
        wait_for_others, others = _hand_on(layer, blocks, (lap, 0), (lap + 1, 0))
        for hop in range(ring.num_near):
            wait, coming = _hand_on(layer, blocks, (lap, hop), (lap, hop + 1))
            if (lap, hop) == (0, 0):
                yield
                layer.absorb_own(state)
            else:
                for origin, block in blocks.items():
                    indices = ring.travellers(origin, (lap, hop))
                    layer.absorb_block(states, block, indices, origin)
            wait()
            blocks = coming
        wait_for_others()
        blocks = others
    return states


def _hand_on(
    layer: LayerExchange, blocks: Mapping[int, Tensor], here: Stage, there: Stage
) -> tuple[Wait, dict[int, Tensor]]:
    """Start to send the blocks on from a stage to a later one, and to receive those that come.

    From the last stage in a host, and to a lap after the last, no keys travel.
    """
    ring = layer.exchange.ring
    sends, receives, coming = [], [], {}
    for origin, block in blocks.items():
        held, going = ring.travellers(origin, here), ring.travellers(origin, there)
        sends.append((ring.rank_at(origin, there), layer.cut(block, origin, held, going)))
    for origin in ring.origins(there):
        tokens = layer.exchange.count_keys(ring.travellers(origin, there), origin)
        coming[origin] = layer.empty_keys(tokens)
        receives.append((ring.rank_at(origin, here), coming[origin]))
    return layer.send("pass_kv", sends, receives), coming
