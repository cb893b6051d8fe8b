"""What heads do: support, entropy, peak, sinks, distances, streamed over long texts."""
