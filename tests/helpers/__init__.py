"""What tests share: tiny models and bases, random edits, hosts of MendCallback, and slow truths to compare with."""
