"""What a reading says about each layer: probes, geometry and drift, as tables of estimates."""
