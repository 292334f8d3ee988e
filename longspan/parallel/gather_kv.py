"""gather-KV: every rank with queries receives all keys and values of a layer at once."""

from longspan.parallel.exchange import Job, LayerExchange


def gather_kv(layer: LayerExchange) -> Job:
    """The bytes of pass-KV in one all-to-all; needs memory for all shards of one layer."""
    exchange = layer.exchange
    rank = exchange.rank
    packed = {}
    sends = []
    for peer in exchange.others:
        wanted = tuple(exchange.seeing(peer, rank))
        if wanted not in packed:
            packed[wanted] = layer.pack_keys(wanted)
        sends.append((peer, packed[wanted]))
    receives = [
        (peer, layer.empty_keys(exchange.count_keys(exchange.seeing(rank, peer), peer)))
        for peer in exchange.others
    ]
    wait = layer.send("gather_kv", sends, receives)
    yield
    state, states = layer.own_states()
    layer.absorb_own(state)
    wait()
    for peer, block in receives:
        layer.absorb_block(states, block, exchange.seeing(rank, peer), peer)
    return states
