"""pass-KV: keys and values go round a ring while queries stay (arXiv 2310.01889, 2411.01783)."""

from longspan.parallel.exchange import Job, LayerExchange


def pass_kv(layer: LayerExchange) -> Job:
    """Every rank's keys visit every rank that has queries for them.

    At each hop a rank hands on the block that it holds and attends to it while it travels.
    R - 1 sends a rank; for even shards `(R - 1) * S / R * 2 * G * D` numbers.
    """
    exchange = layer.exchange
    ring, size = exchange.ranks, len(exchange.ranks)
    place = ring.index(exchange.rank)
    states = layer.empty_states()
    held, block = exchange.rank, layer.pack_keys(exchange.travellers(exchange.rank, 1))
    for hop in range(1, size):
        coming = ring[(place - hop) % size]
        received = layer.empty_keys(exchange.num_travelling(coming, hop))
        handed_on = block[: layer.key_numbers(exchange.num_travelling(held, hop))]
        wait = layer.send(
            "pass_kv", [(ring[(place + 1) % size], handed_on)], [(ring[place - 1], received)]
        )
        if hop == 1:
            yield
            layer.absorb_own(states)
        else:
            layer.absorb_block(states, block, exchange.travellers(held, hop - 1), held)
        wait()
        held, block = coming, received
    if size == 1:
        yield
        layer.absorb_own(states)
    else:
        layer.absorb_block(states, block, exchange.travellers(held, size - 1), held)
    return states
