"""DF-DearKD: training images made from a trained CNN (section 4)."""
