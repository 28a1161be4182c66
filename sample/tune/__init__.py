"""The settings of sampling that suit a checkpoint best, found by measuring them."""
