"""What commands share (options, console), and what the longer of them do once their options are parsed."""
