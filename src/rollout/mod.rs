//! Text sampled from a model as it trains.
