"""The decoder and its mixture-of-experts layers, on one device or a mesh."""
