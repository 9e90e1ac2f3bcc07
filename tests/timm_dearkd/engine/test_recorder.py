import json

from timm_dearkd.engine.recorder import print_results


def test_the_best_epochs_are_those_that_were_evaluated(capsys):
    """An epoch's training loss says nothing beside another's validation loss."""
    results = [
        dict(epoch=0, train=dict(loss=1.)),
        dict(epoch=1, train=dict(loss=.9), validation=dict(loss=2., top1=30.)),
        dict(epoch=2, train=dict(loss=.8)),
        dict(epoch=3, train=dict(loss=.7), validation=dict(loss=3., top1=40.)),
    ]
    for metric, best in (('loss', 1), ('top1', 3)):
        print_results(results, metric)
        mark, _, text = capsys.readouterr().out.partition('\n')
        assert mark == '--result' and json.loads(text)[-1]['epoch'] == best and len(json.loads(text)) == 2
    alone = [(0.5, .1), (0.75, .2), (1., .4), (1., .3)]  # alpha and loss, without validation: of the last alpha alone
    print_results([dict(epoch=i, train=dict(stage=2, alpha=a, loss=loss)) for i, (a, loss) in enumerate(alone)], 'loss')
    assert [r['epoch'] for r in json.loads(capsys.readouterr().out.partition('\n')[2])] == [2, 3]
    print_results([dict(epoch=0, train=dict(loss=1.)), dict(epoch=1, train=dict(loss=.5))], 'loss')
    assert json.loads(capsys.readouterr().out.partition('\n')[2])[-1]['epoch'] == 1
