from subquad.cli import main

main()
