"""HUB in two protocols: the retired one (legacy) and Ultralytics Platform (platform)."""
