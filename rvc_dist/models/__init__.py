"""The networks of an RVC voice: generator, discriminator, and the upstream spelling of their weights."""
