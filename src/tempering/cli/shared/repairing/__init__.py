"""`tempering repair`: what it reads, asks of the reference, learns, and writes."""
