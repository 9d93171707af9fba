"""What models compute with: ``dot`` and ``embed`` for every kind of weight, attention, remat."""
