"""What a training step costs under a layer range, in multiply-adds of the decoder relative to full tuning.

Data flow: a contiguous range of blocks -> share of full tuning's step. Per block: forward 2, gradient of its input 2,
gradient of its weights 2; nothing is differentiated below the lowest block that trains.
"""


def relative_cost(first: int, last: int, num_layers: int, connector_trains: bool = False) -> float:
    """Decoder cost of a step that trains blocks first to last, both included; 1.0 is full tuning.

    Args:
        first: Lowest block that trains.
        last: Highest block that trains.
        num_layers: Blocks of the decoder.
        connector_trains: Whether gradients must reach the connector too.

    Example:
        >>> round(relative_cost(6, 16, 32), 3), round(relative_cost(6, 16, 32, connector_trains=True), 3)
        (0.719, 0.781)
    """
    crossed = num_layers if connector_trains else num_layers - first
    return (2 * num_layers + 2 * crossed + 2 * (last - first + 1)) / (6 * num_layers)
