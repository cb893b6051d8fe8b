"""Scale 4, stages of many generations: the pattern read as width and temperature of stages."""
